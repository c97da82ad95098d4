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
# hours: agft-photo from scratch, the experiment on photographs (needs the archives, AGFT_DATA)
agft pretrain --preset photo --device "$device" --out runs/photo_pretrain_gpu
agft demo --preset photo --seeds 3 --device "$device" --out runs/photo_gpu
python benchmarks/vit_b32.py --device "$device" --out "$out/benchmark_vit_b32_gpu.json"
agft bench --preset photo --device "$device" --out runs/bench_photo_gpu
