#!/usr/bin/env python3
"""Reads a published table with a program that is not ours and computes the metrics again. Prints one JSON object.

    pip install duckdb          (or pyarrow)
    python peers/read_export.py --export warehouse/recommendations --test TEST.parquet

--export  a Parquet file, or the folder of the table: a Delta table, whose log is read for the files of its latest version, or
          Hive partitions (`ds=.../part-0.parquet` below it). --ds picks one day.
--test    the held-out interactions as Parquet: user_id, item_id, one row per user.

Metrics: the mean over the users of the test table; a user whose item is not among the exported rows counts 0.
Hit@k = 1 where the item's rank is at most k; NDCG@k = 1 / log2(rank + 1) there (one relevant item, so the ideal is 1).
Also checks what readers rely on: ranks of a user are 1, 2, 3, ... without gaps, and no item comes twice.
Exit codes: 0, 1 where a check fails, 3 where neither reader is installed.
"""
import argparse
import collections
import glob
import json
import math
import os
import sys

COLUMNS = ("user_id", "item_id", "rank", "bucket", "source")


def delta_files(export, ds):
    """The files of the latest version: what was added and not removed later, commit by commit (no checkpoints)."""
    files = {}
    commits = sorted(glob.glob(os.path.join(export, "_delta_log", "*.json")))
    if not commits or not commits[0].endswith("0" * 20 + ".json"):
        raise SystemExit("the log does not begin at version 0: read it with the deltalake package")
    for commit in commits:
        with open(commit, encoding="utf-8") as lines:
            for line in filter(str.strip, lines):
                action = json.loads(line)
                if "remove" in action:
                    files.pop(action["remove"]["path"], None)
                if "add" in action:
                    files[action["add"]["path"]] = action["add"]["partitionValues"]
    return sorted(os.path.join(export, f) for f, values in files.items() if ds in (None, values.get("ds")))


def files_of(export, ds):
    if os.path.isfile(export):
        return [export]
    if os.path.isdir(os.path.join(export, "_delta_log")):
        return delta_files(export, ds)
    pattern = os.path.join(export, f"ds={ds}" if ds else "ds=*", "*.parquet")
    found = sorted(glob.glob(pattern)) or sorted(glob.glob(os.path.join(export, "*.parquet")))
    if not found:
        raise SystemExit(f"no Parquet file below {export}")
    return found


def duckdb_reader(duckdb):
    def read(files, columns):
        con = duckdb.connect()
        names = ", ".join("'" + f.replace("'", "''") + "'" for f in files)
        return con.sql(f"select {', '.join(columns)} from read_parquet([{names}], hive_partitioning = false)").fetchall()

    return f"duckdb {duckdb.__version__}", read


def pyarrow_reader(pyarrow, parquet):
    def read(files, columns):
        rows = []
        for f in files:
            table = parquet.ParquetFile(f).read(columns=list(columns))
            rows.extend(zip(*(table.column(c).to_pylist() for c in columns)))
        return rows

    return f"pyarrow {pyarrow.__version__}", read


def reader(wanted):
    """(name, function) of the reader that is wanted, or of the first one installed."""
    if wanted in (None, "duckdb"):
        try:
            import duckdb

            return duckdb_reader(duckdb)
        except ImportError:
            pass
    if wanted in (None, "pyarrow"):
        try:
            import pyarrow
            import pyarrow.parquet as parquet

            return pyarrow_reader(pyarrow, parquet)
        except ImportError:
            pass
    print(f"no reader: install {wanted or 'duckdb or pyarrow'}", file=sys.stderr)
    raise SystemExit(3)


def metrics(ranks, ks):
    out = {}
    for k in ks:
        out[f"hit@{k}"] = sum(r is not None and r <= k for r in ranks) / len(ranks) if ranks else None
        gains = (1 / math.log2(r + 1) for r in ranks if r is not None and r <= k)
        out[f"ndcg@{k}"] = math.fsum(gains) / len(ranks) if ranks else None
    return out


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--export", required=True)
    ap.add_argument("--test", required=True)
    ap.add_argument("--ds")
    ap.add_argument("--k", type=int, nargs="+", default=[3, 5, 10])
    ap.add_argument("--reader", choices=["duckdb", "pyarrow"])
    a = ap.parse_args()

    name, read = reader(a.reader)
    files = files_of(a.export, a.ds)
    rows = read(files, COLUMNS)
    test = read([a.test], ("user_id", "item_id"))

    lists, bucket = collections.defaultdict(list), {}
    for user, item, rank, b, _ in rows:
        lists[user].append((rank, item))
        bucket[user] = b
    problems = []
    for user, entries in lists.items():
        if sorted(r for r, _ in entries) != list(range(1, len(entries) + 1)):
            problems.append(f"ranks of user {user}: {sorted(r for r, _ in entries)}")
        if len({i for _, i in entries}) != len(entries):
            problems.append(f"user {user} has an item twice")
    if len({u for u, _ in test}) != len(test):
        problems.append("the test table has a user twice")

    rank_of = {(u, i): r for u, entries in lists.items() for r, i in entries}
    ranks = {u: rank_of.get((u, i)) for u, i in test}
    parts = collections.defaultdict(list)
    for user, rank in ranks.items():
        parts[bucket.get(user)].append(rank)
    print(json.dumps({
        "reader": name,
        "files": files,
        "rows": len(rows),
        "users": len(lists),
        "test_users": len(test),
        "sources": dict(sorted(collections.Counter(r[4] for r in rows).items())),
        "metrics": metrics(list(ranks.values()), a.k),
        "by_bucket": {b or "none": {"users": len(r), **metrics(r, a.k)} for b, r in sorted(parts.items(), key=lambda x: str(x[0]))},
        "problems": problems,
    }))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
