#!/usr/bin/env python3
"""The same weights in other block types: writes a GGUF with every matrix of another one as Q4_0, Q8_0 or F32.

    python3 -m venv peers-venv
    peers-venv/bin/pip install gguf numpy
    peers-venv/bin/python peers/gguf_quantize.py --gguf MODEL.gguf --type Q8_0 --out MODEL.Q8_0.gguf

Metadata and vectors are copied. A matrix is made f32 and rounded to the new type by gguf-py, as llama.cpp's own converter does;
a matrix that already has the type is copied as it is. --head keeps or sets the type of the embedding (and of the head, where
there is one): llama.cpp's Q4_0 files keep it at 8 bits, so Q8_0 is the default.
"""
import argparse

import gguf
import numpy as np
from gguf.quants import dequantize, quantize


def copy_metadata(reader, writer):
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind = field.types[0]
        element = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        value = field.contents()
        if field.name == "general.file_type":
            continue
        writer.add_key_value(field.name, value, kind, sub_type=element)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--gguf", required=True)
    ap.add_argument("--type", required=True, choices=["Q4_0", "Q4_1", "Q8_0", "F16", "F32"])
    ap.add_argument("--head", default="Q8_0", choices=["Q4_0", "Q4_1", "Q8_0", "F16", "F32"])
    ap.add_argument("--out", required=True)
    a = ap.parse_args()

    reader = gguf.GGUFReader(a.gguf)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(a.out, architecture)
    copy_metadata(reader, writer)
    for tensor in reader.tensors:
        is_head = tensor.name in ("token_embd.weight", "output.weight")
        wanted = gguf.GGMLQuantizationType[a.head if is_head else a.type]
        if len(tensor.shape) < 2 or tensor.tensor_type == wanted:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        else:
            values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            writer.add_tensor(tensor.name, quantize(values, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
