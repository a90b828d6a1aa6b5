"""What the makers publish of their chips, for `jaxtok.plan`: figures with a source, and none without."""

from typing import NamedTuple


class Chip(NamedTuple):
    """One chip.

    Attributes:
      name: as a topology begins with it.
      flops: peak FLOP/s of bfloat16 products.
      hbm: bytes/s between the chip and its memory.
      links: bytes/s that a chip can send to its neighbours, over all its links: half of a bidirectional figure.
      memory: bytes of HBM that a program may use, which is less than the chip has: as libtpu 0.0.42 says where one does
        not fit ("exceeds available HBM").
    """

    name: str
    flops: float
    hbm: float
    links: float
    memory: int


GIB = 2**30

# By what jax calls `device_kind`. Pages: cloud.google.com/tpu/docs/v5e, v5p and v6e, "key specifications". The last
# column was read off libtpu. TPU7x is not here: its devices are halves of a chip, and the published figures whole.
CHIPS = {
    # 197 TFLOPs bf16; HBM2 819 GBps; interconnect 1600 Gbps, on newer pages "bidirectional 400 GBps".
    "TPU v5 lite": Chip("v5e", 197e12, 819e9, 200e9, int(15.75 * GIB)),
    # 459 TFLOPs bf16; HBM2e 2765 GBps; interconnect 4800 Gbps.
    "TPU v5": Chip("v5p", 459e12, 2765e9, 600e9, int(95.74 * GIB)),
    # 918 TFLOPs bf16; HBM 1638 GBps (older pages: 1640, 1600); interconnect "bidirectional 800 GBps", 3200 Gbps.
    "TPU v6 lite": Chip("v6e", 918e12, 1638e9, 400e9, int(31.25 * GIB)),
}
