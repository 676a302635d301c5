"""The nightly job as a pod, where workers have no tailfuse: KubernetesPodOperator.

A pod's exit code 99 is a skip by `skip_on_exit_code`; every other code is a failure that Airflow retries. Codes that will
fail again in the same way (1, 2, 65, 70, 78) do so at once: validation comes before any work. `--result` writes the
document where Airflow looks for the XCom, also after a failure.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from airflow.exceptions import AirflowException, AirflowFailException, AirflowSkipException
from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
from airflow.sdk import DAG
from airflow.timetables.interval import CronDataIntervalTimetable
from kubernetes.client import models as k8s


class TailfusePodOperator(KubernetesPodOperator):
    """Fails without a retry where the pod's exit code says that a retry is of no use."""

    def cleanup(self, pod, remote_pod, *args, **kwargs):
        try:
            super().cleanup(pod, remote_pod, *args, **kwargs)
        except AirflowSkipException:
            raise
        except AirflowException as error:
            if self.exit_code(remote_pod) in (1, 2, 65, 70, 78):
                raise AirflowFailException(str(error)) from error
            raise

    def exit_code(self, pod):
        """Of tailfuse's own container; `None` where it has not ended."""
        statuses = (pod.status.container_statuses if pod and pod.status else None) or []
        own = next((s for s in statuses if s.name == self.base_container_name), None)
        return own.state.terminated.exit_code if own and own.state and own.state.terminated else None


with DAG(
    "recommendations_on_kubernetes",
    schedule=CronDataIntervalTimetable("0 3 * * *", timezone="UTC"),
    start_date=datetime(2026, 11, 1),
    catchup=False,
    max_active_runs=1,
):
    TailfusePodOperator(
        task_id="fuse",
        image="registry.example.org/tailfuse:0.1.0",
        cmds=["tailfuse"],
        arguments=[
            "--log-format",
            "json",
            "run",
            "/pipelines/nightly.toml",
            "--param",
            "ds={{ data_interval_start | ds }}",
            "--result",
            "/airflow/xcom/return.json",
        ],
        do_xcom_push=True,
        skip_on_exit_code=99,
        retries=3,
        retry_delay=timedelta(minutes=10),
        # SIGTERM comes first: the run stops at a row boundary within ten seconds.
        termination_grace_period=60,
        container_resources=k8s.V1ResourceRequirements(requests={"memory": "4Gi", "cpu": "4"}),
        env_from=[k8s.V1EnvFromSource(secret_ref=k8s.V1SecretEnvSource(name="object-store"))],
    )
