#!/usr/bin/env bash
# Co-Reg, partial cross-entropy and Co-Reg without its parts on labelled images whose candidate sets are drawn by chance.
#
# Each wrong class is a candidate with chance Q, and ETA of the sets lack the truth.
#
#   baselines/flips.sh --images eurosat --classes classes.txt --backbone local-dir:efficientnet --output_dir runs/flips
#
#   --images FOLDER     with train/CLASS/ and test/CLASS/
#   --classes FILE      one class name a line, called like the folders
#   --backbone NAME     as of train_coreg.py, with pretrained weights for pixels in -1..1
#   --per_class N       training images a class, the first by name (default 100)
#   --size S            side in pixels (default 48)
#   --q Q --eta ETA     (default 0.1 and 0.2)
#   --epochs N          of all, warm-up included (default 20)
#   --seeds "0 1 2"     of candidate sets and of training; parts are taken away with the first alone
#   --jobs K            runs at a time, one thread each (default 1)
#
# The run folder is the job: what is finished is skipped, what was stopped goes on.
set -u

OUT=runs/flips IMAGES="" CLASSES="" BACKBONE="" PER_CLASS=100 SIZE=48 Q=0.1 ETA=0.2 EPOCHS=20 SEEDS="0 1 2" JOBS=1
while (($#)); do
    case $1 in
    --images | --classes | --backbone | --per_class | --size | --q | --eta | --epochs | --seeds | --jobs | --output_dir)
        (($# > 1)) || { echo "error: $1 needs a value after it" >&2 && exit 2; } ;;
    *) sed -n '2,/^set -u/{s/^# \{0,1\}//p}' "$0" >&2 && exit 2 ;;
    esac
    case $1 in
    --images) IMAGES=$2 ;; --classes) CLASSES=$2 ;; --backbone) BACKBONE=$2 ;; --per_class) PER_CLASS=$2 ;; --size) SIZE=$2 ;;
    --q) Q=$2 ;; --eta) ETA=$2 ;; --epochs) EPOCHS=$2 ;; --seeds) SEEDS=$2 ;; --jobs) JOBS=$2 ;; --output_dir) OUT=$2 ;;
    esac
    shift 2
done
for needed in IMAGES CLASSES BACKBONE; do
    [ -n "${!needed}" ] || { echo "error: --${needed,,} is missing; --help shows an example" >&2 && exit 2; }
done
[ -d "$IMAGES/train" ] && [ -d "$IMAGES/test" ] || { echo "error: $IMAGES has no folders train/ and test/" >&2 && exit 2; }

source "$(dirname "$0")/jobs.sh"

# a folder of so many training images a class, and all test images
if [ ! -d "$OUT/images" ]; then
    rm -rf "$OUT/images.tmp" # of a start that was stopped
    for class in "$IMAGES"/train/*/; do
        mkdir -p "$OUT/images.tmp/train/$(basename "$class")"
        find "$class" -type f | sort | head -n "$PER_CLASS" |
            while read -r file; do cp "$file" "$OUT/images.tmp/train/$(basename "$class")/"; done
    done
    cp -r "$IMAGES/test" "$OUT/images.tmp/test" && mv "$OUT/images.tmp" "$OUT/images" || exit 1
fi
for seed in $SEEDS; do
    [ -f "$OUT/store-$seed/manifest.json" ] || "$PYTHON" -m coreg.weak --images "$OUT/images" --classes "$CLASSES" \
        --rule flip --q "$Q" --eta "$ETA" --seed "$seed" --output_dir "$OUT/store-$seed" || exit 1
done

image_options=(--recipe folder --backbone "$BACKBONE" --image_size "$SIZE" --padding $((SIZE / 8)) --workers 0)
for seed in $SEEDS; do
    job=("${image_options[@]}" --annotations "$OUT/store-$seed" --seed "$seed")
    start "coreg-$seed" train_coreg "${job[@]}" --epochs "$EPOCHS"
    start "partial-$seed" train_coreg "${job[@]}" --epochs "$EPOCHS" --warmup_epochs "$EPOCHS"
    start "supervised-$seed" coreg.baselines.pll --method supervised "${job[@]}" --epochs "$EPOCHS"
done
# about as many passes as Co-Reg's
for seed in $SEEDS; do
    start "partial_longer-$seed" train_coreg "${image_options[@]}" --annotations "$OUT/store-$seed" --seed "$seed" \
        --epochs $((5 * EPOCHS)) --warmup_epochs $((5 * EPOCHS))
done
first=${SEEDS%% *}
job=("${image_options[@]}" --annotations "$OUT/store-$first" --seed "$first" --epochs "$EPOCHS")
start "without_co-$first" train_coreg "${job[@]}" --co_pseudo_labels false
start "without_u-$first" train_coreg "${job[@]}" --use_unlabeled false
start "without_contrast-$first" train_coreg "${job[@]}" --contrast_weight 0
start "supervised_contrast-$first" train_coreg "${job[@]}" --contrast supervised
start "without_prototypes-$first" train_coreg "${job[@]}" --prototype_weight 0
start "without_alignment-$first" train_coreg "${job[@]}" --alignment none
start "with_mixup-$first" train_coreg "${job[@]}" --mixup_alpha 4
start "fast-$first" train_coreg "${job[@]}" --preset fast
show_table
