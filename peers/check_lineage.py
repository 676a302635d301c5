"""Reads a file of lineage events (JSON lines) and checks it with openlineage-python's own classes.

    peers/check_lineage.py EVENTS.jsonl        # needs: pip install openlineage-python==1.54.0

Every event is built again as a `RunEvent`, every facet as the class that its `_schemaURL` names, with the version that
the class has; a key that a class does not know, or a missing one, is a mistake. Then: events of a run begin with START and
end with one of COMPLETE, FAIL and ABORT, and parents are there.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
from collections import defaultdict

import attr
import openlineage.client.generated as generated
from openlineage.client.event_v2 import Dataset, InputDataset, Job, OutputDataset, Run, RunEvent, RunState
from openlineage.client.generated.base import BaseFacet, RunFacet
from openlineage.client.serde import Serde

CLASSES = {}
for module in pkgutil.iter_modules(generated.__path__):
    for value in vars(importlib.import_module(f"{generated.__name__}.{module.name}")).values():
        if isinstance(value, type) and issubclass(value, BaseFacet) and hasattr(value, "_get_schema"):
            CLASSES[value._get_schema()] = value


def nested(kind, value):
    """A value as the attrs class that an annotation names, all the way down."""
    module = sys.modules[kind.__module__]
    hints = {a.name: a for a in attr.fields(kind)}
    made = {}
    for key, inner in value.items():
        if key in ("_producer", "_schemaURL"):
            continue
        if key not in hints:
            raise ValueError(f"{kind.__name__} has no `{key}`")
        made[key] = convert(str(hints[key].type), inner, module)
    return kind(**made)


def convert(annotation, value, module):
    names = [n for n in vars(module) if n in annotation and attr.has(vars(module)[n])]
    if not names:
        return value
    kind = vars(module)[max(names, key=len)]
    if isinstance(value, list):
        return [nested(kind, v) for v in value]
    if isinstance(value, dict) and annotation.startswith("dict"):
        return {k: nested(kind, v) for k, v in value.items()}
    return nested(kind, value)


def facets(found):
    made = {}
    for name, facet in found.items():
        url = facet["_schemaURL"]
        if url.endswith("OpenLineage.json#/$defs/RunFacet"):
            made[name] = RunFacet(producer=facet["_producer"])  # our own, without a class
            continue
        if url not in CLASSES:
            raise ValueError(f"`{name}` has the schema {url}, which openlineage-python does not have")
        made[name] = nested(CLASSES[url], facet)
        if made[name]._get_schema() != url:
            raise ValueError(f"`{name}`: {url}")
    return made


def dataset(kind, found):
    more = {}
    if kind is OutputDataset:
        more["outputFacets"] = facets(found.get("outputFacets", {}))
    return kind(namespace=found["namespace"], name=found["name"], facets=facets(found["facets"]), **more)


def event(found):
    known = {"eventType", "eventTime", "run", "job", "inputs", "outputs", "producer", "schemaURL"}
    if set(found) != known:
        raise ValueError(f"keys {sorted(set(found) ^ known)}")
    made = RunEvent(
        eventType=RunState[found["eventType"]],
        eventTime=found["eventTime"],
        run=Run(runId=found["run"]["runId"], facets=facets(found["run"]["facets"])),
        job=Job(
            namespace=found["job"]["namespace"], name=found["job"]["name"], facets=facets(found["job"]["facets"])
        ),
        inputs=[dataset(InputDataset, d) for d in found["inputs"]],
        outputs=[dataset(OutputDataset, d) for d in found["outputs"]],
        producer=found["producer"],
    )
    if made.schemaURL != found["schemaURL"]:
        raise ValueError(f"schemaURL is {found['schemaURL']}, the package has {made.schemaURL}")
    json.loads(Serde.to_json(made))
    return made


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    mistakes, runs, used = [], defaultdict(list), set()
    for number, found in enumerate(lines, 1):
        try:
            made = event(found)
        except Exception as error:  # noqa: BLE001
            mistakes.append(f"line {number} ({found.get('job', {}).get('name')}): {type(error).__name__}: {error}")
            continue
        runs[made.run.runId].append(made)
        for holder in [made.run, made.job, *made.inputs, *made.outputs]:
            used |= set(holder.facets)
        used |= {f for d in made.outputs for f in d.outputFacets}
    for run, events in runs.items():
        kinds = [e.eventType.name for e in events]
        if kinds[0] != "START" or len(kinds) != 2 or kinds[1] not in ("COMPLETE", "FAIL", "ABORT"):
            mistakes.append(f"run {run} of {events[0].job.name}: {kinds}")
        parent = events[0].run.facets.get("parent")
        if parent is not None and "." in events[0].job.name and parent.run.runId not in runs:
            mistakes.append(f"run {run}: its parent is not there")
    for mistake in mistakes:
        print(mistake)
    print(f"{len(lines)} events of {len(runs)} runs; facets: {', '.join(sorted(used))}")
    if mistakes or not lines:
        sys.exit(1)
    print("all right")


if __name__ == "__main__":
    main()
