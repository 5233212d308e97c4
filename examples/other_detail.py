"""Make two versions of one composition: the backbone runs once, superres with two seeds.

python examples/other_detail.py [MODEL] [SECONDS]
"""

import sys
from dataclasses import replace

import numpy as np

from khala_mlx import Khala, Request

model = sys.argv[1] if len(sys.argv) > 1 else "demo"
seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 4

khala = Khala.from_pretrained(model)
request = Request(tags="waltz, slow, happy", lyrics="do re mi", seconds=seconds, seed=1)
take = khala.begin(request)
first = khala.finish(take)
first.save("detail-1.wav")
second = khala.finish(khala.refine_again(take, replace(take.request, refine_seed=2)))
second.save("detail-2.wav")
equal = (first.codes == second.codes).mean(axis=1)
coarse = khala.config.tokens.num_coarse
print(f"coarse codebooks equal: {np.all(equal[:coarse] == 1)}")
print(f"share of equal codes in the other codebooks: {equal[coarse:].mean():.0%}")
