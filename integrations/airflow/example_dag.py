"""A nightly recommendation job, to copy and change. docs/operations.md explains it.

`tailfuse_operator.py` stands next to this file. Variables of the worker: TAILFUSE_PIPELINES, the folder of the
pipeline files; the credentials of the object store under their usual names.
"""

from __future__ import annotations

import os
from datetime import datetime, timedelta

from airflow.sdk import DAG
from airflow.timetables.interval import CronDataIntervalTimetable
from tailfuse_operator import TailfuseOperator

FOLDER = os.environ.get("TAILFUSE_PIPELINES", "/srv/pipelines")
SHARDS = 4

# The day whose data the run is for. A plain cron string would make it the day of the run in Airflow 3.
DS = "{{ data_interval_start | ds }}"

with DAG(
    "recommendations",
    schedule=CronDataIntervalTimetable("0 3 * * *", timezone="UTC"),
    start_date=datetime(2026, 11, 1),
    # Days that were missed are run by `airflow backfill create`, when somebody wants them.
    catchup=False,
    # One partition after the other: a later day's churn audit reads the earlier day's table.
    max_active_runs=1,
    default_args={
        "retries": 3,
        "retry_delay": timedelta(minutes=10),
        "retry_exponential_backoff": True,
        "execution_timeout": timedelta(hours=6),
    },
):
    # Each share of the users is asked about on a worker of its own. The answers go to the ledger (in `artifacts`, on a
    # store that all workers see), and nothing is published.
    ask = TailfuseOperator.partial(
        task_id="ask",
        pipeline=f"{FOLDER}/nightly.toml",
        params_={"ds": DS},
        max_active_tis_per_dagrun=SHARDS,
    ).expand(shard=[f"{i}/{SHARDS}" for i in range(SHARDS)])

    # Finds all answers in the ledger, fuses, audits and publishes. Runs too where a share failed: its users are asked
    # here, within the budget of the pipeline.
    publish = TailfuseOperator(
        task_id="publish",
        pipeline=f"{FOLDER}/nightly.toml",
        params_={"ds": DS},
        arguments=["--skip-current"],
        trigger_rule="all_done",
    )

    ask >> publish


# Mode and weights are chosen once a week; the nightly run reads the artifact.
with DAG(
    "recommendations_calibration",
    schedule=CronDataIntervalTimetable("0 1 * * 1", timezone="UTC"),
    start_date=datetime(2026, 11, 1),
    catchup=False,
    max_active_runs=1,
):
    TailfuseOperator(
        task_id="calibrate",
        pipeline=f"{FOLDER}/calibrate.toml",
        params_={"ds": DS},
        retries=2,
    )
