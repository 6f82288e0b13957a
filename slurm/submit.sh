#!/usr/bin/env bash
# Submits a training to Slurm, once its configuration has been read without a mistake, and prints the job's id and the
# run's folder. Exit status: 0 submitted; 2 refused, with one message.
#
#   slurm/submit.sh CONFIG.toml [--chain N] [options of sbatch] [-- --set KEY=VALUE ...]
#
#   slurm/submit.sh configs/dsv3_2b.toml --nodes=4 --gpus-per-node=8 --time=24:00:00 -- --set run.name=first
#   slurm/submit.sh configs/small.toml --array=1-3      three runs of one folder, with the seeds 1, 2 and 3
#   slurm/submit.sh configs/small.toml --chain 5        five jobs, each after the end of the one before
set -euo pipefail

refuse() {
    echo "submit.sh: $1" >&2
    exit 2
}

is_array=false
chain=1
options=()
settings=()

read_arguments() {
    local previous=
    while (($#)); do
        case $1 in
            --) shift && break ;;
            --chain=*) chain=${1#*=} ;;
            --chain) chain=${2-} && shift $(($# > 1)) ;;
            --set | --set=*) refuse "$1 belongs behind --, after the options of sbatch" ;;
            -D* | --chdir*) refuse "$1: relative paths of the configuration would move; cd there and submit" ;;
            -n* | --ntasks | --ntasks=*) refuse "$1: use --nodes and --ntasks-per-node" ;;
            -*) options+=("$1") ;;
            *)
                # Only as the value of the option before it: sbatch would take another word for its script.
                [[ $previous == -[[:alpha:]] || ($previous == --* && $previous != *=*) ]] || refuse "$1 is no option"
                options+=("$1")
                ;;
        esac
        [[ $1 != -a* && $1 != --array* ]] || is_array=true
        previous=$1
        shift
    done
    [[ $chain =~ ^[1-9][0-9]{0,2}$ ]] || refuse "--chain $chain must be a number of jobs, from 1 to 999"
    settings=("$@")
    while (($#)); do
        [[ $1 == --set=* ]] || { [[ $1 == --set && $# -gt 1 ]] && shift; } ||
            refuse "$1: behind -- come --set KEY=VALUE"
        [[ $is_array == false || ${1#--set=} != run.seed=* ]] || refuse "$1: --array sets run.seed"
        shift
    done
}

# shellcheck disable=SC2016
FIND_RUN='
import sys
from pathlib import Path
from pretrain.config import load_config
from pretrain.errors import UserError
from pretrain.__main__ import build_parser

arguments = build_parser().parse_args(["train", *sys.argv[1:]])
try:
    print(load_config(arguments.config, arguments.set).run.folder.absolute())
except UserError as error:
    sys.exit(f"submit.sh: {error}")
'

main() {
    [[ $# -gt 0 && $1 != -* ]] || refuse "usage: submit.sh CONFIG.toml [options of sbatch] [-- --set KEY=VALUE ...]"
    [[ -f $1 ]] || refuse "no configuration at $1"
    local config run job name arguments jobs=()
    config=$(realpath --no-symlinks -- "$1")
    shift
    read_arguments "$@"
    command -v sbatch >/dev/null || refuse "no sbatch here; submit where Slurm is installed"
    # shellcheck source=SCRIPTDIR/load_environment.sh
    source "$(dirname "${BASH_SOURCE[0]}")/load_environment.sh"
    run=$("$PYTHON" -c "$FIND_RUN" "$config" "${settings[@]}") || exit 2
    mkdir -p -- "$run/slurm" || refuse "$run cannot be made; choose another run.dir"

    name=${run##*/}
    job=%j
    [[ $is_array == false ]] || job=%A_%a
    # In a file name, Slurm replaces what follows a %.
    arguments=(--parsable "--job-name=$name" "--output=${run//%/%%}/slurm/$job.log" "${options[@]}")
    while ((${#jobs[@]} < chain)); do
        ((${#jobs[@]} == 0)) || arguments+=("--dependency=afterany:${jobs[-1]}")
        job=$(sbatch "${arguments[@]}" "$slurm_folder/train.sbatch" "$slurm_folder" "$run" "$config" "${settings[@]}") ||
            refuse "sbatch refused, as said above; submitted so far: ${jobs[*]:-none}"
        jobs+=("${job%%;*}")
    done
    echo "job ${jobs[*]}"
    echo "run $run"
}

main "$@"
