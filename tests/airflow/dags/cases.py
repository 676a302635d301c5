"""The cases of `just test-airflow`: each is a DAG of one task (or a few), run by a real scheduler on the real binary."""

from __future__ import annotations

import os
import sys
from datetime import datetime, timedelta

sys.path.insert(0, os.environ["TAILFUSE_OPERATOR"])

from airflow.sdk import DAG
from airflow.timetables.interval import CronDataIntervalTimetable
from tailfuse_operator import TailfuseOperator

FOLDER = os.environ["TAILFUSE_WORLD"]
DS = "{{ data_interval_start | ds }}"
DAILY = CronDataIntervalTimetable("0 3 * * *", timezone="UTC")


def task(task_id: str, pipeline: str, **more) -> TailfuseOperator:
    return TailfuseOperator(
        task_id=task_id,
        pipeline=f"{FOLDER}/{pipeline}",
        executable=os.environ["TAILFUSE_BINARY"],
        cwd=FOLDER,
        retry_delay=timedelta(seconds=1),
        **{"retries": 2, "params_": {"ds": DS}, **more},
    )


def dag(name: str) -> DAG:
    return DAG(
        name,
        schedule=DAILY,
        start_date=datetime(2026, 11, 1),
        catchup=False,
        max_active_runs=1,
        is_paused_upon_creation=True,
    )


with dag("success"):
    task("fuse", "good.toml")

# Nothing to do, by the binary's own word.
with dag("skip"):
    task("first", "good.toml") >> task("again", "good.toml", arguments=os.environ["TAILFUSE_SKIP_FLAG"].split())

# An audit whose bound no table meets.
with dag("audit"):
    task("fuse", "audit.toml")

# A warehouse that cannot be written to at first; the test mends it after the first try.
with dag("resource"):
    task("fuse", "resource.toml", retries=5)

with dag("backfill"):
    task("fuse", "days.toml")
