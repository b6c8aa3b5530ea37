#!/bin/sh
# Run the numeric tests as other processors and thread counts would compute them:
#
#     scripts/test_processors.sh python [pytest arguments]
#
# Four runs. In them each pair of settings occurs: thread count and instruction set of torch's own kernels, thread count
# and BLAS, instruction set and BLAS. OPENBLAS_CORETYPE is read by numpy's OpenBLAS, MKL_CBWR by torch's MKL: each takes
# another order of sums (AUTO: what this processor has). ROOMS="tests/pruning" runs these tests alone. Set CI=1 for the
# fixed hypothesis examples of CI; without it, they are random.
set -u
python=$1
shift
rooms=${ROOMS:-tests/pruning tests/quantization tests/calibration tests/evaluation tests/kernels}
failed=""

numeric_tests() {
    name="OMP_NUM_THREADS=$1 ATEN_CPU_CAPABILITY=$2 OPENBLAS_CORETYPE=$3 MKL_CBWR=$4"
    shift 4
    echo "== $name"
    env $name OMP_WAIT_POLICY=PASSIVE "$python" -m pytest -q $rooms -m "not slow" "$@" || failed="$failed
$name"
}

numeric_tests 1 default Nehalem COMPATIBLE "$@"
numeric_tests 1 avx2 Haswell AUTO "$@"
numeric_tests 2 default Haswell AUTO "$@"
numeric_tests 2 avx2 Nehalem COMPATIBLE "$@"

if [ -n "$failed" ]; then
    echo "failed with:$failed"
    exit 1
fi
