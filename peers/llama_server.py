#!/usr/bin/env python3
"""llama.cpp's own server with one model, for the tests of remote engines and for trying them by hand.

  pip install xllamacpp
  python llama_server.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf [--port 0] [--api-key SECRET] [--threads 2]

Prints one line, the address (http://127.0.0.1:PORT), once it answers, and serves until its standard input is closed.
The address that a pipeline wants in `engine.url` is that one with /v1 behind it.
"""
import argparse
import sys

import xllamacpp


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--gguf", required=True)
    ap.add_argument("--port", type=int, default=0, help="0: any free one")
    ap.add_argument("--api-key", default="")
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--parallel", type=int, default=2, help="requests at a time")
    ap.add_argument("--n-ctx", type=int, default=2048, help="context of each request")
    a = ap.parse_args()
    params = xllamacpp.CommonParams()
    params.model.path = a.gguf
    params.hostnames = ["127.0.0.1"]
    params.port = a.port
    params.n_parallel = a.parallel
    params.n_ctx = a.n_ctx * a.parallel
    params.cpuparams.n_threads = a.threads
    params.cpuparams_batch.n_threads = a.threads
    params.warmup = False
    if a.api_key:
        params.api_keys = [a.api_key]
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
