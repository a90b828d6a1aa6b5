"""Recipes of several stages: each is a run of its own, in a folder of the workdir, and begins where others ended.

    config.stages = (
        dict(name="codes"),
        dict(name="pixels", total_steps=500_000, task=..., init_from=(dict(path="codes"),)),
    )

A stage is the config with the keys that it gives, each replaced whole. What it trains is its task's business
(`task.frozen`, `init_from`), as of any run. An `init_from` path that is the name of an earlier stage is its workdir.
"""

from etils import epath
from ml_collections import ConfigDict

from jaxtok import build
from jaxtok.checkpoint import Checkpoints


def runs(config: ConfigDict, workdir: str, known) -> list[tuple[epath.Path, ConfigDict]]:
    """(workdir, config) of each stage, in order; without stages, those given.

    Args:
      known: the keys of a config. TypeError for a stage with another; ValueError for one without a name of its own.
    """
    workdir, done, found = epath.Path(workdir).expanduser(), {}, []
    shared = ConfigDict({key: value for key, value in config.items() if key != "stages"})
    stages = config.get("stages", ())
    if not stages:
        return [(workdir, shared)]
    for i, stage in enumerate(stages):
        changes = {key: value for key, value in stage.items() if key != "name"}
        build.check_keys(changes, known, f"config.stages[{i}]")
        name = stage.get("name", "")
        if not name or name in done or epath.Path(name).name != name:
            raise ValueError(f"config.stages[{i}].name is {name!r}: it names a folder, another one for each stage.")
        run = ConfigDict(shared.to_dict() | changes)
        run.init_from = tuple(
            {**source, "path": done.get(source["path"], source["path"])} for source in run.get("init_from", ())
        )
        done[name] = str(workdir / name)
        found.append((workdir / name, run))
    return found


def finished(workdir: epath.Path, config: ConfigDict) -> bool:
    """Whether the run of this config has its last checkpoint."""
    return Checkpoints(workdir).latest() == config.total_steps
