"""An Airflow operator for tailfuse: runs a pipeline and tells Airflow what its exit code means.

Copy this file next to your DAGs; it needs Airflow (2.9 or 3) and nothing else. Exit codes (docs/operations.md):

    0                        success; the result document is the XCom of the task
    99                       nothing to do: the task is skipped
    1, 2, 65, 70, 78         will fail again in the same way: the task fails, whatever `retries` says
    75, 130, 137, 143, other may work next time: the task fails and is retried, and tailfuse goes on where it stopped
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from airflow.exceptions import AirflowException, AirflowFailException, AirflowSkipException

try:
    from airflow.sdk import BaseOperator
except ImportError:  # Airflow 2
    from airflow.models import BaseOperator

SKIP = {99}
NO_RETRY = {1, 2, 65, 70, 78}


class TailfuseOperator(BaseOperator):
    """Runs `tailfuse run PIPELINE`.

    :param pipeline: the pipeline file.
    :param params_: values for `--param`, for example `{"ds": "{{ data_interval_start | ds }}"}`.
    :param sets: values for `--set`.
    :param shard: `"i/n"` for a task that asks the LLM for a share of the users and publishes nothing.
    :param arguments: further arguments, for example `["--skip-current", "--budget", "45"]`.
    :param executable: the binary, or the beginning of a command (`["nice", "tailfuse"]`).
    :param env: variables that are added to the worker's.
    :param cwd: the working folder.
    :param stop_seconds: how long a stopped run may take to come to a row boundary before it is killed.
    """

    template_fields: Sequence[str] = ("pipeline", "params_", "sets", "shard", "arguments", "env", "cwd")

    def __init__(
        self,
        *,
        pipeline: str,
        params_: Mapping[str, Any] | None = None,
        sets: Mapping[str, Any] | None = None,
        shard: str | None = None,
        arguments: Sequence[str] = (),
        executable: str | Sequence[str] = "tailfuse",
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        stop_seconds: float = 30.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.pipeline = pipeline
        self.params_ = dict(params_ or {})
        self.sets = dict(sets or {})
        self.shard = shard
        self.arguments = list(arguments)
        self.executable = executable
        self.env = dict(env or {})
        self.cwd = cwd
        self.stop_seconds = stop_seconds
        self._process: subprocess.Popen[str] | None = None

    def command(self, result: str) -> list[str]:
        """The command line; the result document goes to the file `result`."""
        words = [self.executable] if isinstance(self.executable, str) else list(self.executable)
        words += ["run", self.pipeline, "--result", result]
        for name, value in self.params_.items():
            words += ["--param", f"{name}={value}"]
        for name, value in self.sets.items():
            words += ["--set", f"{name}={value}"]
        if self.shard:
            words += ["--shard", self.shard]
        return words + [str(a) for a in self.arguments]

    def execute(self, context: Any) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="tailfuse-") as folder:
            result = os.path.join(folder, "result.json")
            command = self.command(result)
            self.log.info("%s", " ".join(command))
            # A group of its own: what the run starts is stopped with it.
            self._process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env={**os.environ, **self.env},
                cwd=self.cwd,
                start_new_session=True,
            )
            last: deque[str] = deque(maxlen=10)
            # Both pipes are read, or a full one would stop the run. The document on stdout is in the file too.
            quiet = threading.Thread(target=lambda: deque(self._process.stdout, maxlen=0), daemon=True)
            quiet.start()
            try:
                for line in self._process.stderr:
                    last.append(line.rstrip())
                    self.log.info("%s", line.rstrip())
                code = self._process.wait()
            except BaseException:
                # A time-out of the task, or its worker's end.
                self.on_kill()
                raise
            quiet.join()
            document = self._document(result)
        # A process that a signal ended has its negative number here, and 128 more than it in a shell.
        code = 128 - code if code < 0 else code
        return self._judge(code, document, last, context)

    def _document(self, path: str) -> dict[str, Any]:
        try:
            with open(path, encoding="utf-8") as file:
                return json.load(file)
        except (OSError, ValueError):
            return {}

    def _judge(self, code: int, document: dict[str, Any], last: Sequence[str], context: Any) -> dict[str, Any]:
        if code == 0:
            return document
        error = document.get("error") or {}
        message = error.get("message") or "\n".join(last) or "no message"
        if error.get("help"):
            message += f"\n  help: {error['help']}"
        message = f"tailfuse ended with {code}: {message}"
        if document and context and (task := context.get("ti")):
            # What a task pushes before it fails stays.
            task.xcom_push(key="result", value=document)
        if code in SKIP:
            raise AirflowSkipException(message)
        if code in NO_RETRY:
            raise AirflowFailException(message)
        raise AirflowException(message)

    def on_kill(self) -> None:
        """Asks the run to stop at a row boundary, and waits for it; the next try goes on from there."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        for number, patience in ((signal.SIGTERM, self.stop_seconds), (signal.SIGKILL, 10.0)):
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                return
            try:
                process.wait(patience)
                return
            except subprocess.TimeoutExpired:
                self.log.warning("the run did not stop within %s seconds of signal %s", patience, int(number))
