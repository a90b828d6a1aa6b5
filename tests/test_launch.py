"""Every launch script prints what it would run, exactly; the local one runs for real, as two processes."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.runs import ROOT, logged

ARGUMENTS = ["--config=configs/flextok.py:d18_d28", "--workdir=a place"]
PLACES = dict(
    NAME="run1", ZONE="us-west4-a", TYPE="v5litepod-256", VERSION="v2", CLUSTER="pods", IMAGE="an/image",
    ACCELERATOR="tpu-v5-lite-podslice", TOPOLOGY="16x16", MACHINES="64",
)  # fmt: skip
TRAIN = ["python", "-m", "jaxtok.train", *ARGUMENTS]


def launch(script, *arguments, **environ):
    command = ["bash", ROOT / "launch" / script, *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environ, capture_output=True, text=True, timeout=400)


def printed(script, **environ):
    """The commands that --dry-run prints, as lists of words."""
    done = launch(script, "--dry-run", *ARGUMENTS, **environ)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines() if not line.startswith("#")]


def test_local():
    assert printed("local.sh") == [TRAIN]
    several = ["--coordinator=localhost:29400", "--processes=2"]
    assert printed("local.sh", PROCESSES="2") == [[*TRAIN, *several, f"--process={i}"] for i in range(2)]


@pytest.mark.parametrize("slices", ["1", "3"])
def test_tpu(slices):
    create, pack, copy, install, run = printed("tpu.sh", **PLACES, SLICES=slices, SPOT="true", SETUP="true")
    tpus = ["gcloud", "compute", "tpus", "queued-resources"]
    nodes = ["--node-id=run1"] if slices == "1" else ["--node-count=3", "--node-prefix=run1"]
    machines = ["--zone=us-west4-a", "--accelerator-type=v5litepod-256", "--runtime-version=v2"]
    assert create == [*tpus, "create", "run1", *machines, *nodes, "--spot"]
    assert pack == ["tar", "--exclude=.git", "--exclude=runs", "-czf", "/tmp/jaxtok.tgz", "."]
    everywhere = ["--node=all", "--worker=all"]
    assert copy == [*tpus, "scp", "/tmp/jaxtok.tgz", "--zone=us-west4-a", "run1:", *everywhere]
    *ssh, command = install
    assert ssh == [*tpus, "ssh", "run1", "--zone=us-west4-a", *everywhere]
    assert command.startswith("--command=true && ") and command.endswith("pip install -e './jaxtok[tpu]'")
    *ssh, command = run
    assert ssh == install[:-1]
    python = "--command=cd jaxtok && ~/venv/bin/python -m jaxtok.train --coordinator=auto "
    assert command.startswith(python) and shlex.split(command.removeprefix(python)) == ARGUMENTS


@pytest.mark.parametrize("state", ["SUSPENDED", "ACTIVE"])
def test_tpus_that_are_taken_away_are_asked_for_again(state, tmp_path):
    """With a gcloud whose first attempt to train fails: the machines are then in `state`."""
    fake = tmp_path / "gcloud"
    fake.write_text(
        f"""#!/usr/bin/env bash
echo "$4 $*" >> {tmp_path}/calls
runs=$(grep -c "jaxtok.train" {tmp_path}/calls)
if [ "$4" = describe ]; then
    if [ "$runs" = 0 ] || grep -q ^delete {tmp_path}/calls; then echo ACTIVE; else echo {state}; fi
fi
if [[ "$*" = *jaxtok.train* ]] && [ "$runs" = 1 ]; then exit 255; fi
"""
    )
    tar = tmp_path / "tar"
    tar.write_text("#!/usr/bin/env bash\n")
    for program in (fake, tar):
        program.chmod(0o755)
    done = launch("tpu.sh", *ARGUMENTS, **PLACES, PATIENCE="0", PATH=f"{tmp_path}:{os.environ['PATH']}")
    calls = [line.split()[0] for line in (tmp_path / "calls").read_text().splitlines()]
    once = ["create", "describe", "scp", "ssh", "ssh"]
    if state == "SUSPENDED":
        assert done.returncode == 0, done.stderr
        assert calls == [*once, "describe", "delete", *once]
    else:  # they are there: it is the run that fails, and would again
        assert done.returncode == 1 and "mend it" in done.stderr
        assert calls == [*once, "describe"]


def test_gke():
    done = launch("gke.sh", "--dry-run", *ARGUMENTS, "--config.x=it's", **PLACES, SLICES="2")
    assert done.returncode == 0, done.stderr
    first, *manifest, last = done.stdout.splitlines()
    assert (first, last) == ("kubectl apply -f - <<YAML", "YAML")
    jobset = yaml.safe_load("\n".join(manifest))
    assert (jobset["kind"], jobset["metadata"]["name"]) == ("JobSet", "run1")
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 100
    (slices,) = jobset["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    assert (slices["replicas"], job["parallelism"], job["completions"], job["backoffLimit"]) == (2, 64, 64, 0)
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "16x16",
    }
    (container,) = pod["containers"]
    assert container["image"] == "an/image" and container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["command"] == [*TRAIN, "--config.x=it's"]


def test_xpk():
    ((*words, command),) = printed("xpk.sh", **PLACES)
    assert (
        words
        == (
            "xpk workload create --cluster=pods --workload=run1 --docker-image=an/image --tpu-type=v5litepod-256 "
            "--num-slices=1 --max-restarts=100"
        ).split()
    )
    assert shlex.split(command.removeprefix("--command=")) == TRAIN


def test_slurm():
    assert printed("slurm.sh") == [["srun", "--kill-on-bad-exit=1", *TRAIN]]
    assert re.findall("^#SBATCH --(?:signal|requeue).*", (ROOT / "launch/slurm.sh").read_text(), re.M) == [
        "#SBATCH --signal=TERM@180",
        "#SBATCH --requeue",
    ]


@pytest.mark.parametrize("script", ["tpu.sh", "gke.sh", "xpk.sh"])
def test_what_is_missing_is_named(script):
    done = launch(script, "--dry-run", **{name: "" for name in PLACES})
    assert done.returncode and re.search("(NAME|CLUSTER): (a name for|of xpk)", done.stderr), done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    done = subprocess.run(["shellcheck", *(ROOT / "launch").glob("*.sh")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_local_script_comes_to_each_process_once(number, tmp_path):
    """With a python that notes its signals, and ends at the first; SIGINT goes to a whole group, as from a terminal."""
    python = tmp_path / "python"
    python.write_text(
        f"""#!{sys.executable}
import os, signal, sys, time
os.chdir({str(tmp_path)!r})
noted = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: noted.append(signal.Signals(number).name))
open(sys.argv[-1].strip("-") + ".started", "w").close()
while not noted:
    time.sleep(0.02)
time.sleep(0.3)
open(sys.argv[-1].strip("-"), "w").write(" ".join(noted))
"""
    )
    python.chmod(0o755)
    script = subprocess.Popen(
        ["bash", ROOT / "launch/local.sh"],
        env=os.environ | {"PROCESSES": "2", "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        start_new_session=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # where tests run in the background it is ignored
    )
    try:
        end = time.monotonic() + 60
        while len(list(tmp_path.glob("*.started"))) < 2:
            assert time.monotonic() < end and script.poll() is None
            time.sleep(0.02)
        if number == signal.SIGINT:
            os.killpg(script.pid, number)
        else:
            script.send_signal(number)
        assert script.wait(60) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):  # all have ended, as they should
            os.killpg(script.pid, signal.SIGKILL)
    assert [(tmp_path / f"process={i}").read_text() for i in range(2)] == ["SIGTERM", "SIGTERM"]


def test_two_processes_for_real_have_the_losses_of_one(tmp_path):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = str(s.getsockname()[1])
    flags = ("--config=configs/flextok.py:tiny", "--config.total_steps=4", "--config.task.token_counts=(8,)")
    for processes in (1, 2):
        done = launch(
            "local.sh",
            *flags,
            f"--workdir={tmp_path / str(processes)}",
            PROCESSES=str(processes),
            PORT=port,
            JAX_NUM_CPU_DEVICES=str(4 // processes),
            PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "4 cpu device(s)" in done.stdout and done.stdout.count("step 4/4") == 1
    one, two = (logged(tmp_path / str(processes)) for processes in (1, 2))
    assert one.keys() == two.keys() and max(one) == 4
    np.testing.assert_allclose(list(one.values()), list(two.values()), rtol=1e-5)
