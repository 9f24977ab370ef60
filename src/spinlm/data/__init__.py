"""From a dataset's rows to token ids: row, Example, token ids, Pair."""
