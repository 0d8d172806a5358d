#!/bin/bash
# Installs Debian's Slurm for the tests that need a real one. Where that is not possible it says why and succeeds: those
# tests are skipped then, with the same reason.
set -u

for program in slurmctld slurmd sbatch munged; do
    PATH=$PATH:/usr/sbin:/sbin command -v "$program" >/dev/null || missing=1
done
[ -n "${missing:-}" ] || exit 0

skip() {
    echo "Slurm is not installed: $1; tests on a real Slurm will be skipped"
    exit 0
}
command -v apt-get >/dev/null || skip "this machine has no apt-get"
if [ "$(id -u)" -eq 0 ]; then
    as_root=()
elif sudo -n true 2>/dev/null; then
    as_root=(sudo -n)
else
    skip "installing needs root or sudo without a password"
fi

# A policy that forbids starting services: the packages' own daemons are not wanted, the tests start theirs.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee "$policy" >/dev/null && "${as_root[@]}" chmod 755 "$policy"
    trap '"${as_root[@]}" rm -f "$policy"' EXIT
fi
log=$(mktemp)
apt() { DEBIAN_FRONTEND=noninteractive "${as_root[@]}" apt-get -qq -o DPkg::Lock::Timeout=120 "$@" >>"$log" 2>&1; }
apt update || true # stale lists may do
if apt install -y --no-install-recommends slurmctld slurmd slurm-client munge; then
    echo "installed Slurm for the tests"
    rm -f "$log"
else
    skip "apt-get failed ($(tail -n 1 "$log"); see $log)"
fi
