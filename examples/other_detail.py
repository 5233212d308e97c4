"""One composition, two renderings: the backbone runs once, superres with two seeds.

python examples/other_detail.py [MODEL] [SECONDS]
"""

import sys
from dataclasses import replace

import numpy as np

from khala_mlx import Khala

model = sys.argv[1] if len(sys.argv) > 1 else "demo"
seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 4

khala = Khala.from_pretrained(model)
first = khala.generate(tags="waltz, slow, happy", lyrics="do re mi", seconds=seconds, seed=1)
first.save("detail-1.wav")
request = replace(first.take.request, refine_seed=2)
second = khala.finish(khala.refine_again(first.take, request))
second.save("detail-2.wav")
equal = (first.codes == second.codes).mean(axis=1)
coarse = khala.config.tokens.num_coarse
print(
    f"coarse layers equal: {np.all(equal[:coarse] == 1)}; of the others {equal[coarse:].mean():.0%}"
)
