"""Several processes as one run: each has its own devices, reads its own rows, and calls the same functions in turn."""

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# A process learns within so many seconds that another is gone, if its own collectives do not tell it before.
HEARTBEAT = 30


def join(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Makes this process one of several; before any other call of jax, and in each of them.

    Args:
      coordinator: "HOST:PORT" of process 0, any free port there; "auto": as the cluster says; None: the same where one
        is known by its environment (see `in_cluster`), and alone elsewhere.
      processes, process: how many there are, and which this is; only with HOST:PORT.

    ValueError for one without the others.
    """
    if coordinator in (None, "auto"):
        if (processes, process) != (None, None):
            raise ValueError("--processes and --process need --coordinator=HOST:PORT, where process 0 listens.")
        if coordinator is None and not in_cluster(os.environ):
            return
        coordinator = None
    elif processes is None or process is None:
        raise ValueError(f"--coordinator={coordinator} needs --processes=N and, in each of them, --process=0 ... N-1.")
    elif not 0 <= process < processes:
        raise ValueError(f"--process={process} must lie in 0 ... {processes - 1}, for --processes={processes}.")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # of no effect on other devices
    # It would agree on a step at which to stop, by the steps that each process last told it; Orbax's threads tell it
    # steps long past, and one process then stops where another does not. See `agreement`.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(coordinator, processes, process, heartbeat_timeout_seconds=HEARTBEAT)
    # Gloo waits 30 s for all to come to the first collective: have it now, before each takes its time to compile.
    agreement()(False)


def in_cluster(environ) -> bool:
    """Whether the environment is that of one process of several: of SLURM's srun, or of a TPU pod on GKE.

    A TPU virtual machine that gcloud made says nothing in its environment: there, --coordinator=auto.
    """
    slurm = "SLURM_STEP_ID" in environ and int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1
    tpu = "," in environ.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in environ
    return slurm or tpu


def agreement() -> Callable[[bool], bool]:
    """A function that every process calls once a step: (what this one says) -> whether any said so the step before.

    So all of them act at one step, though a signal reaches them at different ones. The answer is a step late because it
    travels behind the steps on the devices: to wait for it is to wait for the step before, never for the one at hand.
    One process alone is answered at once.
    """
    if jax.process_count() == 1:
        return bool
    everywhere = NamedSharding(Mesh(jax.devices(), ("all",)), P("all"))
    any_of = jax.jit(jnp.any, out_shardings=NamedSharding(everywhere.mesh, P()))
    mine = jax.local_device_count()
    before = any_of(jax.make_array_from_process_local_data(everywhere, np.zeros(mine, bool)))

    def agreed(said):
        nonlocal before
        answer, before = before, any_of(jax.make_array_from_process_local_data(everywhere, np.full(mine, said)))
        return bool(answer)

    return agreed


@contextlib.contextmanager
def until_signal(received):
    """SIGTERM and Ctrl-C put their names into the list, so that the loop ends after the step at hand."""

    def note(number, frame):
        if received:  # the second one means it
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        received.append(signal.Signals(number).name)

    before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def end_together():
    """With several processes, an error ends this one at once: the others would else wait for it, and it for them."""
    try:
        yield
    except Exception:
        if jax.process_count() == 1:
            raise
        traceback.print_exc()
        print(
            f"Process {jax.process_index()} of {jax.process_count()} stops: for the reason above, or because another "
            "one stopped. Start all of them again as before: what is saved is not done again.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # not sys.exit, which waits for the others
