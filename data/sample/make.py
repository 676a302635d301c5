#!/usr/bin/env python3
"""Makes the sample: an invented film club with 60 members, 90 films and some of the dirt of real logs.

    python3 data/sample/make.py data/sample

events.csv: uid, movie, stars, ts (seconds since 1970).  films.csv: movie, name, year.  Every title, member and rating
is made up by the seeded generator below; the same Python gives the same bytes.  In the log on purpose: exact
duplicates, a re-rating, a row without a member, equal times, members with one event, a film without a title, and events
of a film that films.csv lacks.
"""
import csv
import pathlib
import random
import sys

FIRST = ["Quiet", "Last", "Crooked", "Paper", "Silver", "Northern", "Hollow", "Borrowed", "Second", "Distant"]
SECOND = ["Harbour", "Orchard", "Signal", "Winter", "Staircase", "Lantern", "River", "Letter", "Mirror"]
START = 1_700_000_000


def films(rng):
    """Ninety titles; film k belongs to the taste k % 3."""
    names = [f"The {a} {b}" for a in FIRST for b in SECOND]
    rng.shuffle(names)
    return [{"movie": f"f{k:02}", "name": name, "year": 1950 + rng.randrange(70), "taste": k % 3} for k, name in enumerate(names)]


def events(rng, catalogue):
    rows = []
    for u in range(60):
        taste, now = u % 3, START + rng.randrange(86_400 * 200)
        # A few members see many films, most see few: a long tail.
        n = 1 if u in (17, 41) else max(4, int(45 * (u + 1) ** -0.45))
        liked = [f for f in catalogue if f["taste"] == taste]
        others = [f for f in catalogue if f["taste"] != taste]
        seen = set()
        while len(seen) < n:
            pool = liked if rng.random() < 0.8 else others
            # The square makes the first films of a pool the popular ones.
            film = pool[int(len(pool) * rng.random() ** 2)]
            if film["movie"] in seen:
                continue
            seen.add(film["movie"])
            # One event in ten has the time of the one before.
            now += 0 if rng.random() < 0.1 else 3_600 + rng.randrange(86_400 * 5)
            stars = rng.choice([4, 5, 5]) if film["taste"] == taste else rng.choice([1, 2, 3])
            rows.append([f"m{u:02}", film["movie"], stars, now])
    rows.sort(key=lambda r: r[3])
    rows.append(rows[10])
    rows.append(rows[20])
    rows.append([rows[30][0], rows[30][1], 1, rows[30][3] + 60])
    rows.append(["", "f01", 3, START + 1])
    rows.append(["m03", "f99", 4, START + 86_400 * 900])
    return rows


def write(path, header, rows):
    with open(path, "w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def main():
    folder, rng = pathlib.Path(sys.argv[1]), random.Random(7)
    catalogue = films(rng)
    write(folder / "events.csv", ["uid", "movie", "stars", "ts"], events(rng, catalogue))
    catalogue[5]["name"] = ""
    write(folder / "films.csv", ["movie", "name", "year"], [[f["movie"], f["name"], f["year"]] for f in catalogue])


if __name__ == "__main__":
    main()
