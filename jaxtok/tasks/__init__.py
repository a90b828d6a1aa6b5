"""What a training run optimises. A task is `init`, `loss` and `evaluate`: pure functions of trees that train.py holds.

init(key, batch) -> {"params", "mutable", "frozen"}
loss(params, mutable, frozen, batch, key, step) -> (scalar, (mutable, logs))
evaluate(params, mutable, frozen, batch, key) -> {"rows": {name: [B]}, "pictures": [uint8 [B H W 3], ...]}
titles() -> of these pictures. summarize(rows) -> (metrics, table): of all rows of a pass, on the host
check(source): ValueError where a data source is not for this task
sources() -> where frozen weights come from that the task itself names, as `init_from` takes them
"""

from jaxtok.tasks.generator import GeneratorTask
from jaxtok.tasks.tokenizer import MEAN_COLOUR, NO_TEXT, OTHER_TEXT, SWAPPED, TokenizerTask
from jaxtok.tasks.trees import apart, merge

__all__ = ["MEAN_COLOUR", "NO_TEXT", "OTHER_TEXT", "SWAPPED", "GeneratorTask", "TokenizerTask", "apart", "merge"]
