#!/bin/sh
# Three successive days of MovieLens-100K, the recommender trained anew on each: once keeping orders of the LLM that still
# hold, then asking everyone. Prints one line of JSON per run. Usage: peers/replay.sh TAILFUSE [RECOMMENDER] [OVERLAP]
set -eu
tailfuse=$1
recommender=${2:-lightgcn}
overlap=${3:-0.8}
pipeline=pipelines/experiments/replay.toml
before=891129600
for cut in 891216000 891302400 891388800; do
    for reuse in "{ overlap = $overlap, days = 14 }" none; do
        set -- --param "cut=$cut" --param "day_before=$before" --param "recommender=$recommender"
        # Reuse comes first: it must find the ledger as the day before left it.
        if [ "$reuse" != none ]; then set -- "$@" --set "rerank.reuse=$reuse"; fi
        result=$(mktemp)
        "$tailfuse" --quiet run "$pipeline" "$@" --result "$result" >/dev/null
        python3 - "$result" "$recommender" "$cut" "$reuse" <<'PY'
import json, sys
document = json.load(open(sys.argv[1]))
stages = {s["name"]: s for s in document["stages"]}
c = stages["rerank"]["counters"]
# The LLM's own order is measured over the users that have one.
ndcg = {m["system"]: round(m["value"], 4) for m in document["metrics"]
        if m["metric"] == "NDCG@10" and m["bucket"] == "all" and m["users"] == "asked"}
print(json.dumps({"recommender": sys.argv[2], "cut": int(sys.argv[3]), "reuse": sys.argv[4], "asked": c["users_asked"],
                  "reused": c["users_reused"], "evaluated": stages["quality"]["counters"]["users_evaluated"], "ndcg_10": ndcg}))
PY
        rm -f "$result"
    done
    before=$cut
done
