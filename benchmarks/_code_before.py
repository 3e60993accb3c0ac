"""The reward `code` of an earlier checkout, which code_forks.py starts with that checkout on the path.

Reads rows and writes scores, one batch a line of JSON, for the interface of commit 2c6d8da: the last before
its examiner, its reading of answers and its sandbox were changed.
"""

from __future__ import annotations

import json
import sys
from time import perf_counter

from qrpo_core.rewards.config import CodeRewardConfig

from qrpo_core.rewards.base import RewardRequest
from qrpo_core.rewards.code import CodeReward


def main() -> None:
    processes = int(sys.argv[1]) if len(sys.argv) > 1 else None
    reward = CodeReward(CodeRewardConfig(format="mbpp", processes=processes))
    reward.check([])
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        rows = [RewardRequest(name, 0, (), text, truth) for name, text, truth in json.loads(line)]
        begin = perf_counter()
        scores = reward.score(rows)
        seconds = perf_counter() - begin
        said = [(score.status, score.reward) for score in scores]
        print(json.dumps({"seconds": seconds, "scores": said}), flush=True)


if __name__ == "__main__":
    main()
