#!/usr/bin/env bash
# What waits for a GPU, in under nine minutes and without a network: the speed of a training step and of PGD-20 on
# ViT-B/32 (results/speed_gpu.json), of the attacks, and of several processes.
# DEVICE=cpu tries the same commands at a small size. `benchmarks/gpu.sh long` goes on with what takes hours.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
device=${DEVICE:-cuda} out=${OUT:-results}
if [ "$device" = cuda ]; then size=(--architecture ViT-B-32 --batch 256 --precision fp16 --rounds 5); images=256
else size=(--architecture ViT-B-32 --batch 4 --rounds 1); images=4; fi
python benchmarks/train_step.py --preset vit_b32_imagenet --device "$device" "${size[@]}" --no-curves \
       --out "$out/speed_gpu.json"
python benchmarks/attacks.py --device "$device" --images "$images" --rounds 1 --out "$out/benchmark_attacks_gpu.json"
python benchmarks/scale.py --device "$device" --rounds 1 --out "$out/benchmark_scale_gpu.json"
python benchmarks/paper_hours.py --out "$out/paper_hours.json"
[ "${1:-}" = long ] || exit 0
# A small encoder leaves a GPU idle for most of a step: eight processes share it (pip install "dask[distributed]").
export PYTHONPATH=$PWD/benchmarks  # the workers import study.py
dask scheduler --port 8786 &
dask worker tcp://127.0.0.1:8786 --nworkers 8 --nthreads 1 &
trap 'kill $(jobs -p)' EXIT
shared=(--device "$device" --scheduler tcp://127.0.0.1:8786)
# The experiments on photographs need the archives (AGFT_DATA).
agft bench --preset photo "${shared[@]}" --out runs/bench_photo_gpu
python benchmarks/bank.py "${shared[@]}" --preset photo --source tinyimagenet --bank clip-names --steps 400 --sizes 0 \
       --images 285 --runs runs/bank_photo --out "$out/bank_photo.json"
# The small vision transformer of the drawn world, which TGA-ZSR needs.
agft pretrain --preset tiny_vit --device "$device" --out runs/tiny_vit
agft bench --preset tiny_vit --model.name runs/tiny_vit/agft-tiny-vit.safetensors "${shared[@]}" \
       --out runs/bench_tiny_vit_gpu
python benchmarks/vit_b32.py --device "$device" --out "$out/benchmark_vit_b32_gpu.json"
