"""The rules of deny.toml over `cargo metadata`, for machines without cargo-deny: licences, sources, bans.

    peers/check_licences.py                 # from the root of the repository

`just deny` runs cargo-deny where it is installed, and this otherwise. It reads the same file and knows the part of it that
we use: `licenses.allow`, `bans.deny` with a version bound, `sources`. Advisories need the network and are in neither.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib

CRATES_IO = "registry+https://github.com/rust-lang/crates.io-index"


def allowed(expression: str, allow: set[str]) -> bool:
    """Whether an SPDX expression can be met by the allowed licences. `A/B` is the old form of `A OR B`."""
    tokens = re.findall(r"\(|\)|[^\s()]+", expression.replace("/", " OR "))
    at = 0

    def either() -> bool:
        nonlocal at
        held = both()
        while at < len(tokens) and tokens[at] == "OR":
            at += 1
            held = both() or held
        return held

    def both() -> bool:
        nonlocal at
        held = one()
        while at < len(tokens) and tokens[at] == "AND":
            at += 1
            held = one() and held
        return held

    def one() -> bool:
        nonlocal at
        if tokens[at] == "(":
            at += 1
            held = either()
            at += 1
            return held
        name = tokens[at]
        at += 1
        if at < len(tokens) and tokens[at] == "WITH":
            name = f"{name} WITH {tokens[at + 1]}"
            at += 2
        return name in allow or name.removesuffix("+") in allow

    return either()


def version(text: str) -> tuple[int, ...]:
    numbers = [int(n) for n in re.findall(r"\d+", text.split("-")[0])]
    return tuple(numbers + [0] * (3 - len(numbers)))


def main() -> None:
    with open("deny.toml", "rb") as file:
        policy = tomllib.load(file)
    targets = [word for t in policy["graph"]["targets"] for word in ("--filter-platform", t)]
    features = ["--features", ",".join(policy["graph"]["features"])]
    command = ["cargo", "metadata", "--format-version", "1", "--locked", "--offline", *features, *targets]
    metadata = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    used = {node["id"] for node in metadata["resolve"]["nodes"]}
    packages = [p for p in metadata["packages"] if p["id"] in used and p["source"]]
    allow, mistakes = set(policy["licenses"]["allow"]), []
    for exception in policy["licenses"].get("exceptions", []):
        allow_more = {exception.get("crate") or exception.get("name"): set(exception["allow"])}
        for p in packages:
            p["more"] = allow_more.get(p["name"], set())
    for p in packages:
        name = f"{p['name']} {p['version']}"
        if not p["license"]:
            mistakes.append(f"{name}: no licence in its manifest ({p['license_file']})")
        elif not allowed(p["license"], allow | p.get("more", set())):
            mistakes.append(f"{name}: {p['license']} is not allowed")
        if p["source"] != CRATES_IO:
            mistakes.append(f"{name}: from {p['source']}")
        for ban in policy["bans"]["deny"]:
            crate, _, bound = ban["crate"].partition(":")
            if crate == p["name"] and (not bound or version(p["version"]) >= version(bound.removeprefix(">="))):
                mistakes.append(f"{name} is banned: {ban.get('reason', '')}")
    print("\n".join(mistakes) or f"{len(packages)} packages: licences, sources and bans are as deny.toml wants them")
    sys.exit(1 if mistakes else 0)


if __name__ == "__main__":
    main()
