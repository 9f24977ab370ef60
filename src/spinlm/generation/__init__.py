"""Engines that sample responses from a player."""
