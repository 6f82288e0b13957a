# Sourced by submit.sh and train.sbatch: what both know of the site. Sets PYTHON, CONTAINER, SRUN_OPTIONS, MAX_RETRIES
# and PYTHONPATH from the site's file, slurm/environment.sh or $EVA_ENVIRONMENT, and from defaults.
# shellcheck shell=bash disable=SC2034

slurm_folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CONTAINER=()
SRUN_OPTIONS=()
MAX_RETRIES=3
environment=${EVA_ENVIRONMENT:-$slurm_folder/environment.sh}
if [[ -e $environment ]]; then
    set +eu # `module` and other tools of a site are seldom written for these
    # shellcheck source=/dev/null
    source "$environment"
    set -eu
elif [[ -n ${EVA_ENVIRONMENT:-} ]]; then
    echo "${0##*/}: no environment file at EVA_ENVIRONMENT = $EVA_ENVIRONMENT" >&2
    exit 2
fi
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=$slurm_folder/../.venv/bin/python
    [[ -x $PYTHON ]] || PYTHON=python3
fi
export PYTHONPATH=${slurm_folder%/*}${PYTHONPATH:+:$PYTHONPATH}
