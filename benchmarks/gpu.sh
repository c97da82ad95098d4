#!/usr/bin/env bash
# What waits for a GPU, in one go: pre-training agft-photo from scratch, the speed of a training step and of the attacks,
# three seeds of the photograph experiment, a full-size encoder's training step, the benchmark on photographs.
# Needs the archives of photographs (AGFT_DATA).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
agft pretrain --preset photo --device cuda --out runs/photo_pretrain_gpu
python benchmarks/train_step.py --preset photo --device cuda --out results/benchmark_train_step_gpu.json
python benchmarks/attacks.py --device cuda --out results/benchmark_attacks_gpu.json
agft demo --preset photo --seeds 3 --device cuda --out runs/photo_gpu
python benchmarks/vit_b32.py --device cuda --out results/benchmark_vit_b32_gpu.json
agft bench --preset photo --device cuda --out runs/bench_photo_gpu
