#!/usr/bin/env bash
# Samples with the weights that ship, and the page about them:
#
#     benchmarks/page.sh                  # docs/report.html, samples in images/page
#     benchmarks/page.sh ../official      # with rows for the test.json and new_test.json of that folder
#
# With PRECISION=bf16 all but the first lists are sampled in half precision: three quarters of an hour on 2 cores.
set -euo pipefail
cd "$(dirname "$0")/.."
out=images/page
sample() { python sample.py --overwrite --weights weights/small --evaluator weights/evaluator.pth "$@"; }
more() { sample --mixed-precision "${PRECISION:-no}" "$@"; }
sample --mixed-precision no --out $out --mode test new_test unseen process --seeds 10
more --out $out --mode train --num-images 2100
more --out $out/best_of_4 --mode test new_test --seeds 10 --best-of 4
more --out $out/evaluator_guided --mode test new_test --seeds 10 --evaluator-scale 1
if [ $# -gt 0 ]; then
    more --out $out/lab --mode "$1/test.json" "$1/new_test.json" --seeds 10
fi
python -m report $out --out docs/report.html --data data/iclevr.npz
