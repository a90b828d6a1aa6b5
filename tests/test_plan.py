"""The plan of a run: what a step takes of each chip, held against arithmetic and against programs that truly differ."""

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from configs import ar_flextok, flextok
from jaxtok import hlo, plan, sharding
from jaxtok.chips import CHIPS, GIB, Chip
from jaxtok.nn import linear
from jaxtok.nn.transformer import remat_policy
from tests.runs import ROOT, tiny

SMALL = Chip("small", 1e12, 1e11, 1e10, GIB)  # figures as good as any, for the host
WIDTH, DEPTH, TOKENS = 128, 3, 4
PATCH = 16 * 16 * 3 // TOKENS


class Stack(nn.Module):
    """`depth` layers of one linear map and a tanh, in a scan: [B 16 16 3] -> [B TOKENS WIDTH]."""

    depth: int = DEPTH
    remat: str = "none"

    @nn.compact
    def __call__(self, x):
        x = linear.Linear(WIDTH, name="embed")(x.reshape(len(x), TOKENS, -1) / 255.0)  # [B N D]
        layer = lambda module, x, _: (jnp.tanh(module(x)), None)
        if self.remat != "none":
            layer = nn.remat(layer, policy=remat_policy(self.remat), prevent_cse=False)
        scan = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth)
        return scan(linear.Linear(WIDTH, bias=False, name="layers"), x, None)[0]


@dataclasses.dataclass(frozen=True)
class Square:
    """A task as small as can be: it makes the outputs of a model small."""

    model: nn.Module

    def check(self, source):
        pass

    def init(self, key, batch):
        return {"params": self.model.init(key, batch["image"])["params"], "mutable": {}, "frozen": {}}

    def loss(self, params, mutable, frozen, batch, key, step):
        loss = (self.model.apply({"params": params}, batch["image"]) ** 2).mean()
        return loss, (mutable, {})


class Pairs(Square):
    """Its loss compares all pictures of a batch with all."""

    def loss(self, params, mutable, frozen, batch, key, step):
        x = self.model.apply({"params": params}, batch["image"]).mean(1)
        return ((x @ x.T) ** 2).mean(), (mutable, {})


def square(**changes):
    """A config of that task, on pictures [16 16 3]."""
    task = dict(name="tests.test_plan.Square", model=dict(name="tests.test_plan.Stack", depth=DEPTH, remat="none"))
    config = tiny(sharding=((".*", "fsdp"),), batch_size=64, task=task)
    for key, value in changes.items():
        config.update_from_flattened_dict({key.replace("__", "."): value})
    return config


def chip(monkeypatch, memory=GIB):
    """Gives the host's devices a chip's figures."""
    monkeypatch.setitem(CHIPS, "cpu", SMALL._replace(memory=memory))


@pytest.fixture(scope="module")
def eight():
    """The plan of eight devices that share the state."""
    return plan.plan(square(mesh__data=1, mesh__fsdp=8), "cpu:8")


# ---- what it says ----


def test_the_parts_of_a_chips_memory_are_those_of_the_layout(eight):
    held, split = eight["bytes"], 4 * (PATCH * WIDTH + DEPTH * WIDTH**2)
    assert eight["parameters"] == split // 4 + WIDTH
    assert held["params"] == held["ema"] == split // 8 + 4 * WIDTH  # all have the bias
    assert held["opt_state"] == 2 * held["params"] + 8  # two moments and two counters
    assert held["batch"] == 8 * (16 * 16 * 3 + 4 + 4 * 4)  # pictures, labels, patch labels
    assert held["temporaries"] > 0 and eight["fits"]
    assert abs(eight["needed"] - sum(held.values())) < 200  # labels that the loss does not read are left out
    assert eight["needed"] > 0.99 * sum(held.values())


def test_flops_are_counted_of_the_batch_and_of_a_chip(eight):
    rows = 64 * TOKENS
    once = 2 * rows * (PATCH * WIDTH + DEPTH * WIDTH**2)
    backward = once + 2 * rows * DEPTH * WIDTH**2  # by the weights, and by the inputs of all but the first
    assert eight["flops"] == {
        "step": once + backward,
        "picture": (once + backward) / 64,
        "executed": (once + backward) / 8,
    }
    again = plan.plan(square(task__model__remat="full", mesh__fsdp=8, mesh__data=1), "cpu:8")["flops"]
    assert again["step"] == eight["flops"]["step"]
    assert again["executed"] == eight["flops"]["executed"] + 2 * rows * DEPTH * WIDTH**2 / 8


def test_what_a_chip_sends_is_known_by_arithmetic(eight):
    """Each weight is gathered for the forward pass and for the backward one, but those of the embedding, whose inputs
    have no gradient; each gradient is summed over all."""
    layers, embed, bias = 4 * DEPTH * WIDTH**2, 4 * PATCH * WIDTH, 4 * WIDTH
    sent = eight["moved"]["collectives"]
    assert sent["all-gather"] == (2 * layers + embed) * 7 / 8
    assert 0 <= sent["all-reduce"] - 2 * (layers + embed + bias) * 7 / 8 < 100  # and of a few scalars, for the log
    assert eight["moved"]["hoistable"] == eight["moved"]["unknown"] == 0


def test_times_divide_by_what_is_published(monkeypatch, eight):
    chip(monkeypatch)
    report = plan.plan(square(mesh__data=1, mesh__fsdp=8), "cpu:8", quick=True)
    moved = report["moved"]
    assert moved == eight["moved"]
    assert report["seconds"] == {
        "compute": report["flops"]["executed"] / SMALL.flops,
        "HBM": moved["hbm"] / SMALL.hbm,
        "interconnect": sum(moved["collectives"].values()) / SMALL.links,
    }
    assert report["bound"] == max(report["seconds"], key=report["seconds"].get)
    assert f"\n{report['bound']} binds." in plan.show(report)


def test_how_many_pictures_fill_the_memory(monkeypatch):
    chip(monkeypatch, 32 * 2**20)
    config = square(batch_size=2048)
    report = plan.plan(config, "cpu:8")
    fills = report["per_chip_that_fills"]
    assert report["per_chip"] == 256 < fills
    for pictures, fits in ((int(0.9 * fills), True), (int(1.1 * fills), False)):
        config.batch_size = 8 * pictures
        assert plan.compile_step(config, jax.devices())["fits"] == fits


def test_what_does_not_fit_is_mended_by_the_first_that_does(monkeypatch):
    whole, shared = (plan.plan(square(mesh__data=8 // fsdp, mesh__fsdp=fsdp), "cpu:8")["needed"] for fsdp in (1, 8))
    assert shared < whole / 2
    chip(monkeypatch, (whole + shared) // 2)
    config = square()
    report = plan.plan(config, "cpu:8")
    assert not report["fits"] and report["cheapest"] in ("mesh.fsdp=2", "mesh.fsdp=4", "mesh.fsdp=8")
    *failed, last = report["tried"].values()
    assert last <= report["memory"] and all(size > report["memory"] for size in failed)
    assert config.mesh.data == -1  # the config of the caller is left alone

    chip(monkeypatch, 1000)
    report = plan.plan(config, "cpu:8")
    assert report["cheapest"] is None
    assert list(report["tried"]) == [
        *(f"mesh.fsdp={n}" for n in (2, 4, 8)),
        *(f"remat={policy}" for policy in ("dots", "full")),
        *(f"accumulate={n}" for n in (2, 4, 8)),  # 16 parts have fewer pictures than there are chips
    ]
    assert "none of these; take more chips" in plan.show(report | {"said": ""})


def test_accumulation_holds_one_gradient_however_many_parts_there_are():
    two, eight = (
        plan.plan(square(batch_size=64 * parts, accumulate=parts), "cpu:8", quick=True)["bytes"] for parts in (2, 8)
    )
    assert abs(eight["temporaries"] - two["temporaries"]) < two["params"]  # six more would be six times that


def test_the_words_of_a_compiler_that_refuses():
    said = "RESOURCE_EXHAUSTED: ... Program hbm requirement 34.54G (34.54G) exceeds available HBM (15.75G) by 18.79G"
    assert plan.needed(said) == int(34.54 * GIB)
    assert plan.needed("Ran out of memory in memory space hbm. Used 17.25G of 15.75G hbm.") == int(17.25 * GIB)
    with pytest.raises(RuntimeError, match="The compiler gave up: out of luck"):
        plan.needed("out of luck")


# ---- what grows with the number of chips ----


def sent(chips, **changes):
    """Bytes that a chip sends in a step of 64 pictures a chip."""
    config = square(batch_size=64 * chips, mesh__data=1, mesh__fsdp=chips, **changes)
    return sum(plan.plan(config, f"cpu:{chips}", quick=True)["moved"]["collectives"].values())


def test_what_a_chip_sends_does_not_grow_with_their_number():
    # A ring of n sends (n - 1) / n of an array, which is 1.17 times as much with 8 as with 4, and never twice.
    four, eight = sent(4), sent(8)
    assert eight == pytest.approx(four * (7 / 8) / (3 / 4), rel=1e-3)

    # The control: a loss that compares each picture with all of them. Every chip gathers the batch.
    more = [sent(chips, task__name="tests.test_plan.Pairs") - plain for chips, plain in ((4, four), (8, eight))]
    assert more[1] > 2 * more[0] > 0


# ---- what it refuses ----


@pytest.mark.parametrize(
    "topology, changes, message",
    [
        ("cpu:9", {}, "cpu:9: this process has 1 to 8 CPU devices"),
        ("cpu:0", {}, "this process has 1 to 8"),
        ("v9z:2x2", {}, r'Topology "v9z:2x2": .*Names are v5e:16x16.*jaxtok\[plan\]'),
        ("cpu:8", dict(batch_size=12), r"A batch of 12 cannot be split over data=8 .* \(such as 8 or 16\)"),
        ("cpu:8", dict(accumulate=3), "batch_size 16 must be divisible by accumulate 3"),
        ("cpu:8", dict(accumulate=4), "A batch of 4 cannot be split"),
        ("cpu:8", dict(mesh__data=3), "does not fit 8 devices"),
    ],
)
def test_what_does_not_go_together(topology, changes, message):
    with pytest.raises(ValueError, match=message):
        plan.plan(tiny(**changes), topology)


def test_the_text_of_a_mesh():
    assert plan.parse_mesh("data:16,fsdp:all") == {"data": 16, "fsdp": -1}
    for text in ("data=16", "16x16", "data:", "data:1:2"):
        with pytest.raises(ValueError, match=f'--mesh={text}: write axes and sizes as "data:16'):
            plan.parse_mesh(text)
    with pytest.raises(TypeError, match='config.mesh has no key "fdsp". Did you mean "fsdp"'):
        plan.plan(tiny(mesh=plan.parse_mesh("fdsp:8")), "cpu:8")


def test_a_generator_needs_its_tokenizer_and_then_its_codes(tmp_path, monkeypatch):
    config = ar_flextok.get_config("tiny")
    config.task.tokenizer = str(tmp_path)
    with pytest.raises(FileNotFoundError, match="task.tokenizer: there is no .*config.json; it is the workdir"):
        plan.plan(config, "cpu:8")
    config.data.train.source = dict(name="data.sources.Tokenized", path=str(tmp_path / "codes"))
    (tmp_path / "config.json").write_text(json.dumps(tiny().to_dict()))
    with pytest.raises(FileNotFoundError, match="codes"):
        plan.plan(config, "cpu:8")


def test_pictures_that_are_not_at_hand_are_grey_ones():
    config = flextok.get_config("d12_d12")
    shapes = plan.batch_shapes(config, None)
    assert {name: x.shape for name, x in shapes.items()} == {"image": (256, 256, 256, 3), "label": (256,)}


# ---- layouts of many chips ----


def layout(variant, **sizes):
    """The shares of the state of a published size that each of 256 chips would hold."""
    config = flextok.get_config(variant)
    mesh = jax.sharding.AbstractMesh((sizes["data"], sizes["fsdp"], 1), sharding.AXES)
    task = plan.build.build(config.task)
    state = jax.eval_shape(task.init, jax.random.key(0), plan.batch_shapes(config, task))["params"]
    placed = sharding.shardings(state, mesh, config.sharding)
    return [
        (sharding.path_name(path), x.size, math.prod(s.shard_shape(x.shape)) / x.size)
        for (path, x), s in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(placed), strict=True)
    ]


def test_a_width_that_256_does_not_divide_names_the_mesh_that_it_takes():
    with pytest.raises(ValueError, match="adaln/kernel .*fsdp=256 divides none of its dimensions; mesh.fsdp=128 can"):
        layout("d18_d18", data=1, fsdp=256)
    shares = layout("d18_d18", data=2, fsdp=128)
    large = {name: share for name, size, share in shares if size > 2**20}
    assert len(large) > 10 and set(large.values()) == {1 / 128}


# ---- the command ----


def command(*arguments, config="configs/flextok.py:tiny"):
    return subprocess.run(
        [sys.executable, "-m", "jaxtok.plan", f"--config={config}", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_the_command():
    done = command("--topology=cpu:4,cpu:8", "--per_chip=4", "--mesh=data:1,fsdp:all")
    assert done.returncode == 0, done.stderr
    for line in (
        "cpu:4, 4 chips, mesh data=1, fsdp=4, tensor=1, batch 16",
        "cpu:8, 8 chips",
        "all-gather",
        "A chip and",
    ):
        assert line in done.stdout
    assert not any(word in done.stdout for word in ("binds.", "HBM", "optimal"))  # nobody published a host's figures
    assert done.stdout.count("4 pictures") == 0


RECIPE = """
from configs import common, flextok

def get_config(variant=""):
    second = flextok.get_config("tiny")
    second.batch_size = 8
    return common.in_stages(first=flextok.get_config("tiny"), second=second)
"""


def test_each_stage_of_a_recipe_is_planned(tmp_path):
    (tmp_path / "recipe.py").write_text(RECIPE)
    done = command("--topology=cpu:2", "--quick", config=tmp_path / "recipe.py")
    assert done.returncode == 0, done.stderr
    titles = [line for line in done.stdout.splitlines() if "2 chips" in line]
    assert [title[:7] for title in titles] == ["first: ", "second:"] and titles[1].endswith("batch 8")


# ---- TPUs ----


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason='TPUs are compiled for by libtpu: pip install "jaxtok[plan]"'
)
def test_a_pod_that_is_not_there():
    report = plan.plan(square(mesh__data=2, mesh__fsdp=4), "v5e:2x4", quick=True)
    assert report["chips"] == 8 and report["fits"] and report["memory"] == CHIPS["TPU v5 lite"].memory
    assert set(report["seconds"]) == {"compute", "HBM", "interconnect"} and min(report["seconds"].values()) > 0
    assert set(report["moved"]["collectives"]) <= set(hlo.KINDS) and not report["moved"]["unknown"]
    devices = plan.topology_devices("v6e:16x16")
    assert sharding.make_mesh(16, 16, devices=devices).size == 256
    with pytest.raises(ValueError, match="the torus of these TPUs"):
        sharding.make_mesh(2, 128, devices=devices)
