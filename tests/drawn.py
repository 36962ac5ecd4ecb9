"""What our sampling draws, and what transformers' own would leave to draw from:
`python -m tests.drawn < settings.json`.

For each settings of a list, over logits of a fixed seed: the tokens that transformers leaves in with their shares, and
how often ours drew which in 4,000 draws.
"""

import json
import sys
from collections import Counter

import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.worker.generation.sampling import Sampling, choose_token

DRAWS = 4000


def main() -> None:
    logits = 3 * torch.randn(50, generator=torch.Generator().manual_seed(0))
    prompt, written = [1, 2], [3, 4, 4]
    told = []
    for settings in json.load(sys.stdin):
        how = Sampling(seed=0, **settings)
        theirs = LogitsProcessorList()
        theirs.append(RepetitionPenaltyLogitsProcessor(how.repetition_penalty))
        theirs.append(TemperatureLogitsWarper(how.temperature))
        if how.top_k:
            theirs.append(TopKLogitsWarper(how.top_k))
        theirs.append(TopPLogitsWarper(how.top_p))
        shares = theirs(torch.tensor([prompt + written]), logits[None])[0].softmax(-1)
        source = how.generator()
        drawn = Counter(int(choose_token(logits, prompt, written, how, source)) for _ in range(DRAWS))
        left = {i: share for i, share in enumerate(shares.tolist()) if share > 0}
        told.append({"left": left, "drawn": {i: count / DRAWS for i, count in drawn.items()}})
    print(json.dumps(told))


if __name__ == "__main__":
    main()
