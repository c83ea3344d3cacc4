"""Sweeps, and jobs of a cluster, as the commands start them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]

# What submitit asks of SLURM, for a job of one process. Its script is run until nobody asks for it
# to be queued again.
SLURM = {
    "sbatch": """(
        while echo RUNNING > state; bash "$1"; grep -q REQUEUED state; do :; done
        echo COMPLETED > state
    ) > /dev/null 2>&1 &
    echo Submitted batch job 17""",
    "srun": """while [ "${1#--}" != "$1" ]; do
        case $1 in --output | --error) shift 2 ;; *) shift ;; esac
    done
    echo $$ > pid
    exec "$@" """,
    "scontrol": """echo REQUEUED > state
    echo "$@" > asked""",
    "sacct": """echo 'JobID|State|NodeList'
    echo "17|$(cat state)|localhost" """,
}
JOB = {
    "JOB_ID": 17, "JOB_NAME": "job", "JOB_NUM_NODES": 1, "NTASKS": 1, "NTASKS_PER_NODE": 1,
    "PROCID": 0, "LOCALID": 0, "NODEID": 0, "NODELIST": "localhost",
}  # fmt: skip


@pytest.fixture
def start(small, tmp_path):
    """start(*WORDS): `train.py -m` with so many, in the temporary folder."""

    def start(*words: str, **environment: str) -> subprocess.Popen:
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        options = [*small, "trainer.limit_train_batches=2", "trainer.limit_val_batches=1"]
        options += ["logger=none", "hydra.sweep.dir=sweep"]
        return subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), "-m", *options, *words],
            env={**os.environ, "PYTHONPATH": path, **environment},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


@pytest.mark.slow
def test_optuna_searches_for_the_best_objective(start, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="comes with nat-models[sweep]")
    search = start("sweep=optuna", "hydra.sweeper.n_trials=2", "debug=short")
    output, _ = search.communicate(timeout=100)
    assert search.returncode == 0, output
    best = yaml.safe_load((tmp_path / "sweep" / "optimization_results.yaml").read_text())
    assert set(best["best_params"]) == {"optimizer.lr", "optimizer.weight_decay"}
    trials = [yaml.safe_load(path.read_text()) for path in tmp_path.glob("sweep/*/config.yaml")]
    tried = [trial["optimizer"]["lr"] for trial in trials]
    assert len(set(tried)) == 2
    assert best["best_params"]["optimizer.lr"] in tried
    metrics = [yaml.safe_load(path.read_text()) for path in tmp_path.glob("sweep/*/metrics.json")]
    assert best["best_value"] == pytest.approx(max(m["val/top1"] for m in metrics), abs=1e-6)


@pytest.mark.slow
def test_a_job_that_slurm_warns_is_queued_again_and_goes_on(start, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="nat-models[cluster]")
    for name, script in SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/sh\ncd {tmp_path}\n{script}\n")
        (tmp_path / name).chmod(0o755)
    launch = start(
        "launcher=slurm", "trainer.devices=1", "trainer.max_epochs=30",
        PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        **{f"SLURM_{name}": str(value) for name, value in JOB.items()},
    )  # fmt: skip
    folder = tmp_path / "sweep" / "0"
    deadline = time.monotonic() + 60
    while not (folder / "best.ckpt").exists():  # the first epoch is over
        assert launch.poll() is None, launch.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGUSR2)
    output, _ = launch.communicate(timeout=100)
    assert launch.returncode == 0, output
    assert (tmp_path / "asked").read_text() == "requeue 17\n"
    log = (folder / "train.log").read_text()
    assert log.count("device ") == 2  # two runs,
    assert log.count("epoch ") == 30  # no epoch twice
    script = next(tmp_path.glob("sweep/.submitit/17/*.sh")).read_text()
    assert "#SBATCH --signal=USR2@120" in script
    assert "#SBATCH --gpus-per-node=1" in script
