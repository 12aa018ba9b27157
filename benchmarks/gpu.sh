#!/usr/bin/env bash
# What only a GPU can measure, in stages, the most valuable first:
#
#   benchmarks/gpu.sh reference     # the recipe of the report, 40 epochs; its lists sampled and scored
#   benchmarks/gpu.sh small         # the small model for longer than two CPU cores allow; its weights
#   benchmarks/gpu.sh bench         # our loops against plain ones (speed.py)
#   benchmarks/gpu.sh study         # the report's experiments, 40 epochs a row (docs/study.md); hours
#   benchmarks/gpu.sh longer        # after the first two: both models for longer, the reference to 150 epochs
#   benchmarks/gpu.sh all           # these five in this order, each until it is done
#   DRY_RUN=1 benchmarks/gpu.sh all # every stage on a CPU with a few steps, in some minutes
#
# Time. A stage trains for LIMIT seconds at most, so that a call takes some nine minutes. If that was not enough it
# exits with 75, and the same command goes on where it stopped. The reference trained at 1,441 pictures a second on an
# NVIDIA H200, its 40 epochs take 8.3 minutes there, and at 1,200 on an H100: 10 minutes. From the start to its first
# step it took two minutes on the H200 and three on the H100, most of them compiling, which is needed once a machine.
# `small` trained at up to 4,000 a second at batch 128 on the H200, beside another training: its 30,000 steps take 16
# minutes at that rate.
# Sampling comes after: for the reference some two minutes, one of them for 128 pictures of 1000 steps.
#
# If a GPU is lent for 15 minutes in all, that is enough for one stage, made shorter (estimated from these rates).
# First `EPOCHS=25 benchmarks/gpu.sh reference`, and again at once if it exits with 75. Next time, on another
# machine, `SMALL_STEPS=15000 benchmarks/gpu.sh small`. Then `bench`: what it measured before it ran out of time is
# in speed.json. `longer` takes about an hour.
#
# A stage's results (JSON, grids, curves, weights in half precision) are in $WORK/results/STAGE and are packed as
# $OUT/STAGE.tar.*, pieces of 15 MiB, after each part of a stage: cat STAGE.tar.* | tar x. Checkpoints stay in $WORK,
# which should be a local disk: a machine that is given back takes them along, and its stage starts anew on the next
# one. So the next call must follow at once: a machine that stood idle went back with 36 epochs on it. Needs no
# network: where diffusers or timm is missing, both come from the wheels in $WHEELS.
set -euo pipefail
cd "$(dirname "$0")/.."
WORK=${WORK:-${TMPDIR:-/tmp}/iclevr-ddpm}
OUT=${OUT:-runs/gpu}
WHEELS=${WHEELS:-.whl}
LIMIT=${LIMIT:-500} # seconds that a stage may train
EPOCHS=${EPOCHS:-40} # of the reference
SMALL_STEPS=${SMALL_STEPS:-30000}
python=${PYTHON:-python3}
mkdir -p "$WORK/results" "$OUT"
export PYTHONUNBUFFERED=1 TORCHINDUCTOR_CACHE_DIR=$WORK/compiled
export PYTHONPATH=$WORK/site${PYTHONPATH:+:$PYTHONPATH}
if ! $python -c 'from importlib.util import find_spec as f; exit(not (f("diffusers") and f("timm")))'; then
    $python -m pip install -q --no-index --no-deps --no-compile --target "$WORK/site" "$WHEELS"/*.whl
fi

bench=(--models reference small)
small=(--batch-size 128 --learning-rate 4e-3 --max-steps "$SMALL_STEPS")
small_longer=(--batch-size 128 --learning-rate 2e-3 --max-steps 60000)
reference_model=reference
reference=(--epochs "$EPOCHS")
reference_longer=(--epochs 150)
few_steps=(--seeds 10 --steps 20 --sampler dpmsolver++)
all_steps=(--seeds 2)
seeds=(--seeds 10)
study=()
if [ -n "${DRY_RUN:-}" ]; then
    bench=(--models small --pairs 1 --block 1 --batch-size 4 --sample-steps 2)
    small=(--batch-size 4 --max-steps 2 --sample-every 0)
    small_longer=(--batch-size 4 --max-steps 1 --sample-every 0)
    reference_model=small
    reference=(--batch-size 4 --lr-schedule constant --max-steps 2 --sample-every 0)
    reference_longer=(--batch-size 4 --lr-schedule constant --max-steps 3 --sample-every 0)
    few_steps=(--num-images 2 --steps 2 --sampler dpmsolver++)
    all_steps=(--num-images 1 --steps 3)
    seeds=(--num-images 2 --steps 2)
    study=("no EMA" --dry-run)
fi

# train NAME SECONDS ARGS...: trains into $WORK/NAME for so long at most. `timeout` then sends SIGTERM, train.py
# saves a checkpoint, and `timeout` exits with 124.
train() {
    local name=$1 seconds=$2 code=0
    shift 2
    timeout "$seconds" "$python" train.py --out "$WORK/$name" --sample-every 5000 "$@" \
        2>"$WORK/$name.err" | tee "$results/$name.txt" || code=$?
    tr '\r' '\n' <"$WORK/$name.err" | tail -n 3
    if [ -s "$WORK/$name/log.jsonl" ]; then
        cp "$WORK/$name/log.jsonl" "$results/$name.jsonl"
        $python -m bookkeeping.curves "$WORK/$name" --out "$results/$name.png"
    fi
    local grids=("$WORK/$name/samples/"*.png)
    [ ! -e "${grids[-1]}" ] || cp "${grids[-1]}" "$results/$name-samples.png"
    [ $code != 124 ] || exit 75
    return $code
}

# score NAME LABEL "MODES" ARGS...: samples and scores these lists, unless they were scored before
score() {
    local name=$1 out=$results/$2 modes
    read -ra modes <<<"$3"
    shift 3
    ! grep -qs '"accuracies"' "$out/${modes[-1]}.json" || return 0
    $python sample.py --weights "$WORK/$name" --mode "${modes[@]}" --out "$out" --overwrite "$@" 2>"$WORK/sample.err" ||
        { tail -n 20 "$WORK/sample.err" && return 1; }
    for mode in "${modes[@]}"; do rm -rf "${out:?}/$mode"; done # the grids stay
    pack
}

score_reference() {
    score reference "few-$1" "process test new_test unseen" "${few_steps[@]}"
    score reference "all-$1" "test new_test" "${all_steps[@]}"
}

stage_reference() {
    train reference "$((LIMIT - 60))" --model $reference_model "${reference[@]}"
    score_reference "$EPOCHS"
}

# score_small NAME
score_small() {
    score "$1" "$1" "process test new_test unseen" "${seeds[@]}"
    $python checkpoint.py "$WORK/$1" "$results/$1/weights"
}

stage_small() {
    train small "$LIMIT" --model small "${small[@]}"
    score_small small
}

stage_bench() {
    local code=0
    timeout "$LIMIT" "$python" benchmarks/speed.py "${bench[@]}" --json "$results/speed.json" \
        2>"$WORK/bench.err" | tee "$results/speed.md" || code=$?
    [ $code != 124 ] || { echo "out of time: speed.json has what was measured" && return; }
    return $code
}

stage_study() {
    local code=0
    timeout "$LIMIT" "$python" benchmarks/study.py --budget full --out "$results" --work "$WORK/study" "${study[@]}" \
        2>"$WORK/study.err" | tee "$results/study.md" || code=$?
    [ $code != 124 ] || exit 75
    return $code
}

stage_longer() {
    train small-longer "$((LIMIT / 2))" --model small --init "$WORK/small" "${small_longer[@]}"
    score_small small-longer
    train reference "$((LIMIT / 2 - 60))" --model $reference_model "${reference_longer[@]}"
    score_reference 150
}

pack() {
    tar c -C "$WORK/results" "$stage" | split -b 15M - "$OUT/$stage.tar."
}

finish() {
    local code=$?
    pack
    echo "stage $stage: exit code $code after $SECONDS s"
}

stage=${1:?a stage: reference, small, bench, study, longer or all}
if [ "$stage" = all ]; then
    for each in reference small bench study longer; do
        code=75
        while [ $code = 75 ]; do code=0; benchmarks/gpu.sh $each || code=$?; done
        [ $code = 0 ] || exit $code
    done
else
    results=$WORK/results/$stage
    mkdir -p "$results"
    trap finish EXIT
    "stage_$stage"
fi
