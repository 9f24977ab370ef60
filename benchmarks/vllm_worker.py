"""Generates by vLLM what standard input asks for.

The interpreter that has vLLM runs it, so it imports nothing of ours.
"""

from __future__ import annotations

import json
import sys
import time

MARK = "spinlm-bench: "
"""Before every line that is meant for the parent: vLLM prints too."""


def main(model: str, slots: str, length: str) -> None:
    import vllm
    from vllm import LLM, SamplingParams

    engine = LLM(
        model, dtype="float32", max_num_seqs=int(slots), max_model_len=int(length), enforce_eager=True, seed=0,
        generation_config="vllm", disable_log_stats=True,
    )  # fmt: skip
    say({"version": vllm.__version__})
    for line in sys.stdin:
        job = json.loads(line)
        sampling = SamplingParams(
            max_tokens=job["max_tokens"], temperature=job["temperature"], stop_token_ids=job["stop_token_ids"], seed=0
        )
        prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
        engine.reset_prefix_cache()  # every turn asks the same
        started = time.perf_counter()
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - started
        say({"seconds": seconds, "answers": [list(output.outputs[0].token_ids) for output in outputs]})


def say(message: dict[str, object]) -> None:
    print(MARK + json.dumps(message), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
