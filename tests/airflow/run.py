"""Runs tailfuse under a real Airflow: scheduler, API server and DAG processor, a SQLite database, the real binary.

    tests/airflow/run.py --airflow VENV/bin --tailfuse target/release/tailfuse [--log docs/airflow-test.md]

Checks a success, a skip, an audit that is not retried, a resource that fails, is retried and resumes, and a backfill of
three days. `--log` writes what happened as a page of the docs. Needs nothing but the Airflow (requirements.txt).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

PIPELINE = """name = "{name}"
[params]
ds = "2026-11-01"
[sources.events]
uri = "events.csv"
{source}
[stages.days]
kind = "sql"
input = "events"
query = \"\"\"
select user_id, item_id, count(*) as times, min(row_id) as row_id from input where day <= '{{{{ ds }}}}' group by user_id, item_id
\"\"\"
{audit}
[stages.publish]
kind = "write"
input = "days"
table = "{name}"
partition = {{ ds = "{{{{ ds }}}}" }}
{write}
"""

AUDIT = """[stages.checks]
kind = "audit"
inputs = { recommendations = "days" }
[stages.checks.checks]
enough = { file = "enough.sql", min = 1000000 }
"""


def world(folder: Path, audit: str, source: str) -> None:
    days = [f"2026-11-{d:02d}" for d in range(1, 21)]
    rows = [f"u{u},i{n},{days[n]}" for u in range(1, 9) for n in range(20)]
    (folder / "events.csv").write_text("user_id,item_id,day\n" + "\n".join(rows) + "\n")
    (folder / "enough.sql").write_text("select count(*) as value from recommendations\n")
    plain = {"source": source, "audit": "", "write": ""}
    (folder / "good.toml").write_text(PIPELINE.format(name="good", **plain))
    (folder / "days.toml").write_text(PIPELINE.format(name="days", **plain))
    text = PIPELINE.format(name="refused", source=source, audit=audit, write='audits = ["checks"]')
    (folder / "audit.toml").write_text(text)
    text = PIPELINE.format(name="late", **plain)
    (folder / "resource.toml").write_text(text.replace("[params]", 'warehouse = "store/warehouse"\n[params]', 1))
    # A file in the place of a folder: nothing can be put below it.
    (folder / "store").write_text("")


class Airflow:
    def __init__(self, bin: Path, tailfuse: Path, folder: Path, skip_flag: str) -> None:
        self.bin, self.folder = bin, folder
        self.home = folder / "airflow"
        self.home.mkdir()
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith("AIRFLOW")},
            "PATH": f"{bin}:{os.environ['PATH']}",
            "AIRFLOW_HOME": str(self.home),
            "AIRFLOW__CORE__DAGS_FOLDER": str(HERE / "dags"),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
            "AIRFLOW__CORE__PARALLELISM": "2",
            "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"http://127.0.0.1:{port}/execution/",
            "AIRFLOW__API__PORT": str(port),
            "AIRFLOW__API__WORKERS": "1",
            "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "600",
            "AIRFLOW__DAG_PROCESSOR__PARSING_PROCESSES": "1",
            "AIRFLOW__LOGGING__LOGGING_LEVEL": "INFO",
            "NO_PROXY": "127.0.0.1,localhost",
            "TAILFUSE_OPERATOR": str(ROOT / "integrations" / "airflow"),
            "TAILFUSE_WORLD": str(folder),
            "TAILFUSE_BINARY": str(tailfuse),
            "TAILFUSE_SKIP_FLAG": skip_flag,
        }
        self.processes: list[subprocess.Popen] = []

    def command(self, *words: str) -> str:
        done = subprocess.run([self.bin / "airflow", *words], env=self.env, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"airflow {' '.join(words)}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
        return done.stdout

    def start(self) -> None:
        self.command("db", "migrate")
        for part in ("api-server", "dag-processor", "scheduler"):
            log = open(self.home / f"{part}.log", "w")
            process = subprocess.Popen(
                [self.bin / "airflow", part], env=self.env, stdout=log, stderr=log, start_new_session=True
            )
            self.processes.append(process)

    def stop(self) -> None:
        for process in self.processes:
            try:
                os.killpg(process.pid, signal.SIGTERM)
            except ProcessLookupError:
                pass
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)

    def ask(self, query: str, *values: str) -> list[tuple]:
        try:
            with sqlite3.connect(f"file:{self.home}/airflow.db?mode=ro", uri=True, timeout=30) as db:
                return db.execute(query, values).fetchall()
        except sqlite3.OperationalError as error:
            print(f"  (database: {error})")
            return []

    def wait(self, what: str, seconds: float, ready) -> None:
        end = time.time() + seconds
        while not ready():
            if time.time() > end:
                for part in ("api-server", "dag-processor", "scheduler"):
                    print(f"--- {part}\n{(self.home / f'{part}.log').read_text()[-3000:]}")
                sys.exit(f"waited {seconds:.0f} s for {what}")
            time.sleep(0.5)

    def tasks(self, dag: str) -> list[tuple]:
        """(logical date, task, state, tries), in order."""
        return self.ask(
            "select substr(coalesce(r.data_interval_start, r.logical_date), 1, 10), t.task_id, t.state, t.try_number "
            "from task_instance t join dag_run r on r.dag_id = t.dag_id and r.run_id = t.run_id "
            "where t.dag_id = ? order by 1, t.start_date",
            dag,
        )

    def states(self, dag: str) -> list[str]:
        return [s for (s,) in self.ask("select state from dag_run where dag_id = ?", dag)]

    def unpause(self, dag: str) -> None:
        """The scheduler then makes the run of the last whole day."""
        self.command("dags", "unpause", dag)

    def over(self, dag: str, runs: int = 1, seconds: float = 240) -> None:
        done = lambda: [s for s in self.states(dag) if s in ("success", "failed")]
        self.wait(f"{runs} run(s) of {dag}", seconds, lambda: len(done()) >= runs)

    def logs(self, dag: str) -> list[tuple[str, str]]:
        """(name of the try, its lines by tailfuse and our operator)."""
        found = []
        for file in sorted((self.home / "logs" / f"dag_id={dag}").rglob("*.log")):
            lines = []
            for line in file.read_text().splitlines():
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                event = str(record.get("event", ""))
                if record.get("filename") == "tailfuse_operator.py":
                    lines += event.splitlines()
                elif record.get("level") in ("error", "critical") or event.startswith("Skipping task"):
                    for error in record.get("error_detail") or []:
                        lines.append(f"{error.get('exc_type')}: {error.get('exc_value')}")
                    if not record.get("error_detail"):
                        lines.append(event)
            names = [p for p in file.parts[:-1] if p.startswith("task_id")]
            found.append((" ".join([*names[-1:], file.stem]), [line for line in lines if line.strip()]))
        return found


class Report:
    def __init__(self, hide: list[tuple[str, str]]) -> None:
        self.hide, self.parts, self.failed = hide, [], 0

    def clean(self, text: str) -> str:
        for what, word in self.hide:
            text = text.replace(what, word)
        text = re.sub(r"/tmp/tailfuse-[^ /]+", "/tmp/...", text)
        return re.sub(r"\d{8}T\d{6}Z-[0-9a-f]{6}", "RUN_ID", text)

    def case(self, title: str, checks: list[tuple[str, bool]], tasks: list[tuple], logs: list[tuple[str, list[str]]]) -> None:
        print(f"\n{title}")
        for name, held in checks:
            self.failed += not held
            print(f"  {'ok    ' if held else 'FAILED'} {name}")
        for row in tasks:
            print("   ", *row)
        text = [f"## {title}\n"]
        text += [f"- {'holds' if held else 'DOES NOT HOLD'}: {name}" for name, held in checks]
        text += ["\n| day | task | state | tries |", "| --- | --- | --- | --- |"]
        text += [f"| {' | '.join(str(c) for c in row)} |" for row in tasks]
        for name, lines in logs:
            shown = [self.clean(line)[:300] for line in lines]
            text += [f"\n{self.clean(name)}:\n", "```", *shown, "```"]
        self.parts.append("\n".join(text))


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--airflow", type=Path, required=True, help="the bin folder of the environment")
    arguments.add_argument("--tailfuse", type=Path, required=True)
    arguments.add_argument("--log", type=Path)
    given = arguments.parse_args()
    binary = given.tailfuse.resolve()
    help_text = subprocess.run([binary, "run", "--help"], capture_output=True, text=True).stdout
    kinds = subprocess.run([binary, "schema"], capture_output=True, text=True).stdout
    with tempfile.TemporaryDirectory(prefix="tailfuse-airflow-") as name:
        folder = Path(name).resolve()
        if "--skip-current" not in help_text or '"stage.audit"' not in kinds:
            sys.exit("this binary has no --skip-current or no audits")
        world(folder, AUDIT, "")
        airflow = Airflow(given.airflow.resolve(), binary, folder, "--skip-current")
        report = Report([(str(binary), "tailfuse"), (str(folder), "/srv/pipelines"), (socket.gethostname(), "worker")])
        try:
            airflow.start()
            dags = {"success", "skip", "audit", "resource", "backfill"}
            known = lambda: {d for (d,) in airflow.ask("select dag_id from dag")}
            airflow.wait("the DAGs", 240, lambda: dags <= known())
            cases(airflow, folder, report)
        finally:
            airflow.stop()
        if given.log:
            version = subprocess.run([given.airflow / "airflow", "version"], capture_output=True, text=True, env=airflow.env)
            head = HEAD.format(airflow=version.stdout.strip().splitlines()[-1])
            given.log.write_text(head + "\n\n".join(report.parts) + "\n")
    sys.exit(1 if report.failed else 0)


HEAD = """# tailfuse in a real Airflow

Written by `just test-airflow`: Airflow {airflow} with a scheduler, an API server and a DAG processor of its own, the
operator of [integrations/airflow](../integrations/airflow/tailfuse_operator.py), and the real binary on a small made log.
Every exit code is the binary's own. Lines of a task's log are those of the run and of our operator; paths are shortened.

"""


def partitions(folder: Path, table: str) -> list[str]:
    return sorted(p.name for p in (folder / "warehouse" / table).glob("ds=*"))


def cases(airflow: Airflow, folder: Path, report: Report) -> None:
    for dag in ("success", "skip", "audit", "resource"):
        airflow.unpause(dag)

    # The resource comes back after the first failure.
    tried = lambda: any(s == "up_for_retry" or (n or 0) > 1 for _, _, s, n in airflow.tasks("resource"))
    airflow.wait("a failure of `resource`", 240, tried)
    (folder / "store").unlink()

    airflow.over("success")
    tasks = airflow.tasks("success")
    values = airflow.ask("select value from xcom where dag_id = 'success' and key = 'return_value'")
    document = json.loads(values[0][0]) if values else {}
    if isinstance(document, str):
        document = json.loads(document)
    report.case(
        "A success",
        [
            ("the task succeeds at its first try", [t[2:] for t in tasks] == [("success", 1)]),
            ("the XCom is the result document", document.get("status") == "ok" and document["tables"][0]["rows"] > 0),
            ("`ds` is the day of the data", document.get("params", {}).get("ds") == tasks[0][0]),
        ],
        tasks,
        airflow.logs("success"),
    )

    airflow.over("skip")
    tasks = airflow.tasks("skip")
    report.case(
        "Nothing to do: exit 99",
        [("the second task is skipped, not failed", {t[1]: t[2] for t in tasks} == {"first": "success", "again": "skipped"})],
        tasks,
        [log for log in airflow.logs("skip") if "again" in log[0]],
    )

    airflow.over("audit")
    tasks = airflow.tasks("audit")
    report.case(
        "An audit refuses: exit 1, no retry",
        [
            ("the task fails at its first try, with two retries left", [t[2:] for t in tasks] == [("failed", 1)]),
            ("the run ended with 1", "tailfuse ended with 1:" in str(airflow.logs("audit"))),
            ("nothing was published", partitions(folder, "refused") == []),
        ],
        tasks,
        airflow.logs("audit"),
    )

    airflow.over("resource")
    tasks = airflow.tasks("resource")
    logs = airflow.logs("resource")
    text = "\n".join("\n".join(lines) for _, lines in logs)
    report.case(
        "A resource fails: exit 75, retried, resumed",
        [
            ("the task succeeds at a later try", tasks[0][2] == "success" and tasks[0][3] > 1),
            ("the first try ended with 75", "tailfuse ended with 75" in text),
            ("the later try found the work of the first", "cached" in text),
        ],
        tasks,
        logs,
    )

    airflow.unpause("backfill")
    airflow.command(
        "backfill", "create", "--dag-id", "backfill", "--from-date", "2026-11-03", "--to-date", "2026-11-06",
        "--max-active-runs", "1", "--reprocess-behavior", "none",
    )
    # The three days, and the last one, which the schedule brings.
    airflow.over("backfill", 4)
    tasks = [t for t in airflow.tasks("backfill") if t[0] <= "2026-11-05"]
    days = partitions(folder, "days")
    wanted = {"ds=2026-11-03", "ds=2026-11-04", "ds=2026-11-05"}
    report.case(
        "A backfill of three days",
        [
            ("three runs succeed", [t[2:] for t in tasks] == [("success", 1)] * 3),
            (f"each day has its partition: {', '.join(sorted(wanted))}", wanted <= set(days)),
        ],
        tasks,
        airflow.logs("backfill"),
    )


if __name__ == "__main__":
    main()
