#!/bin/bash
# A real systemd as PID 1 of a throw-away container, booted in under a second.
#
#   real_systemd.sh check               why it can't be had here (exit 1), or nothing
#   real_systemd.sh up [DIR PLACE]...   boot it; the host's DIR is at PLACE inside, read-only
#   real_systemd.sh exec CMD...         run CMD inside, as root
#   real_systemd.sh down                end it, leave nothing behind
#
# $MACHINE is its state folder. Needs root with CAP_SYS_ADMIN, overlayfs, cgroup2 (a hybrid hierarchy will do), unshare,
# nsenter, systemd and dbus-daemon; neither systemd-nspawn nor a container engine.
#
# It has mount, pid, cgroup, uts and ipc namespaces of its own. The network is the host's, so that a client outside
# reaches 127.0.0.1:PORT inside. Its root is an overlay of the host's root file system: what is written inside goes to a
# tmpfs that ends with it, as do /tmp and /run. /sys and /proc/sys are read-only, units about hardware are masked, and PID 1 takes
# itself for a container's: the host's settings stay as they are. Limits of memory, CPU and tasks are not enforced.
set -euo pipefail
: "${MACHINE:?the state folder}"
export MACHINE
SELF=$(readlink -f "$0")
SEARCH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export PATH="$PATH:$SEARCH"

MASKED="systemd-sysctl.service systemd-udevd.service systemd-udev-trigger.service systemd-udevd-control.socket
systemd-udevd-kernel.socket systemd-modules-load.service kmod-static-nodes.service systemd-timesyncd.service
systemd-resolved.service systemd-networkd.service systemd-random-seed.service systemd-remount-fs.service
systemd-binfmt.service proc-sys-fs-binfmt_misc.automount systemd-machine-id-commit.service modprobe@.service
systemd-journal-flush.service systemd-journald-audit.socket systemd-update-utmp.service systemd-pstore.service
systemd-tmpfiles-setup-dev.service systemd-firstboot.service dev-hugepages.mount dev-mqueue.mount
sys-kernel-debug.mount sys-kernel-tracing.mount sys-kernel-config.mount sys-fs-fuse-connections.mount
systemd-ask-password-console.path systemd-ask-password-wall.path"

die() {
    echo "$*" >&2
    exit 1
}

cgroup2() { # where it is mounted
    local mount
    for mount in /sys/fs/cgroup /sys/fs/cgroup/unified; do
        if [ "$(stat -fc %T "$mount" 2>/dev/null)" = cgroup2fs ]; then
            echo "$mount"
            return
        fi
    done
    return 1
}

check() {
    local command
    [ "$(id -u)" = 0 ] || die "needs root"
    for command in unshare nsenter pivot_root dbus-daemon systemctl; do
        command -v "$command" >/dev/null || die "needs $command"
    done
    [ -x /lib/systemd/systemd ] || die "needs /lib/systemd/systemd"
    [ "$(cgroup2 && mkdir "$(cgroup2)/lightllmd-check.$$" && rmdir "$(cgroup2)/lightllmd-check.$$" && echo made)" ] ||
        die "needs a writable cgroup2 hierarchy"
    mkdir -p "$MACHINE/check"
    unshare --mount --pid --fork --cgroup --uts --ipc bash -ec '
        mount -t tmpfs tmpfs "$1"
        mkdir "$1/upper" "$1/work" "$1/root"
        mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$1/root"
        mount -t proc proc "$1/root/proc"' bash "$MACHINE/check" >"$MACHINE/check.log" 2>&1 ||
        die "needs the right to namespaces and mounts: $(tail -n 1 "$MACHINE/check.log")"
    rmdir "$MACHINE/check"
}

pid1() { # its number outside
    local parent
    parent=$(cat "$MACHINE/unshare.pid" 2>/dev/null) || return 1
    tr -d ' ' <"/proc/$parent/task/$parent/children" 2>/dev/null | grep .
}

up() {
    ! pid1 >/dev/null || die "already up"
    mkdir -p "$MACHINE/root" "$MACHINE/scratch"
    local group attempt
    group="$(cgroup2)/lightllmd-test.$$"
    mkdir "$group"
    echo "$group" >"$MACHINE/cgroup"
    (
        echo $BASHPID >"$group/cgroup.procs"
        exec unshare --mount --pid --fork --cgroup --uts --ipc --kill-child=KILL bash "$SELF" stage2 "$@"
    ) >"$MACHINE/console.log" 2>&1 </dev/null &
    echo $! >"$MACHINE/unshare.pid"
    for attempt in $(seq 1200); do
        (inside systemctl is-system-running) >"$MACHINE/state" 2>/dev/null && return
        if grep -q degraded "$MACHINE/state"; then
            inside systemctl --failed >&2
            die "booted with failed units"
        fi
        kill -0 "$(cat "$MACHINE/unshare.pid")" 2>/dev/null || die "PID 1 ended: $(cat "$MACHINE/console.log")"
        sleep 0.05
    done
    die "not running after $attempt looks: $(cat "$MACHINE/state")"
}

stage2() { # as PID 1 of the new namespaces: make the root, become systemd
    local root=$MACHINE/root scratch=$MACHINE/scratch node unit
    mount --make-rprivate /
    mount -t tmpfs -o mode=755 tmpfs "$scratch"
    mkdir "$scratch/upper" "$scratch/work"
    mount -t overlay overlay -o "lowerdir=/,upperdir=$scratch/upper,workdir=$scratch/work" "$root"
    mount -t proc -o nosuid,nodev,noexec proc "$root/proc"
    for node in sys sysrq-trigger; do
        [ -e "$root/proc/$node" ] || continue
        mount --bind "$root/proc/$node" "$root/proc/$node"
        mount -o remount,bind,ro "$root/proc/$node"
    done
    mount -t sysfs -o ro,nosuid,nodev,noexec sysfs "$root/sys"
    mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 "$root/sys/fs/cgroup"
    mount -t tmpfs -o mode=755,nosuid,nodev tmpfs "$root/run"
    mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs "$root/tmp"
    mount -t tmpfs -o mode=755,nosuid tmpfs "$root/dev"
    for node in /dev/null /dev/zero /dev/full /dev/random /dev/urandom /dev/tty /dev/nvidia*; do
        [ -c "$node" ] || continue
        touch "$root$node"
        mount --bind "$node" "$root$node"
    done
    mkdir "$root/dev/pts" "$root/dev/shm"
    mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts "$root/dev/pts"
    mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs "$root/dev/shm"
    ln -s pts/ptmx "$root/dev/ptmx"
    ln -s /proc/self/fd "$root/dev/fd"
    ln -s fd/0 "$root/dev/stdin"
    ln -s fd/1 "$root/dev/stdout"
    ln -s fd/2 "$root/dev/stderr"
    mkdir -p "$root/run/systemd/system" "$root/run/systemd/journald.conf.d" "$root/run/systemd/system.conf.d"
    # The only target that is booted; the host's own enabled services stay off.
    printf '%s\n' '[Unit]' 'Description=Boot for tests' 'AllowIsolate=yes' 'Requires=systemd-journald.service dbus.socket' \
        'After=systemd-journald.service dbus.socket' >"$root/run/systemd/system/test.target"
    printf '%s\n' '[Journal]' 'Storage=volatile' 'Audit=no' 'ReadKMsg=no' 'ForwardToConsole=no' 'RateLimitBurst=0' \
        >"$root/run/systemd/journald.conf.d/test.conf"
    printf '%s\n' '[Manager]' 'DefaultTimeoutStopSec=10s' >"$root/run/systemd/system.conf.d/test.conf"
    for unit in $MASKED; do
        ln -s /dev/null "$root/run/systemd/system/$unit"
    done
    while [ $# -gt 0 ]; do
        mkdir -p "$root$2"
        mount --bind "$1" "$root$2"
        mount -o remount,bind,ro "$root$2"
        shift 2
    done
    tr -d - </proc/sys/kernel/random/uuid >"$root/run/machine-id"
    [ -e "$root/etc/machine-id" ] || : >"$root/etc/machine-id"
    mount --bind "$root/run/machine-id" "$root/etc/machine-id"
    rm -f "$root/usr/sbin/policy-rc.d" # a package installed inside may start its service
    cd "$root"
    mkdir -p mnt/host
    pivot_root . mnt/host
    umount -l /mnt/host
    exec env -i container=lightllmd-test LANG=C.UTF-8 PATH=$SEARCH \
        /lib/systemd/systemd --system --unit=test.target --show-status=no --log-target=journal --log-level=info
}

inside() {
    local pid
    pid=$(pid1) || die "not up"
    nsenter -t "$pid" -m -p -C -u -i -- env -i -C / HOME=/root TERM=dumb LANG=C.UTF-8 SYSTEMD_PAGER=cat \
        SYSTEMD_COLORS=0 PATH=$SEARCH "$@"
}

down() { # the kernel ends a whole pid namespace with its PID 1
    local parent pid attempt group
    if parent=$(cat "$MACHINE/unshare.pid" 2>/dev/null); then
        for attempt in $(seq 1200); do
            kill -0 "$parent" 2>/dev/null || break
            if pid=$(pid1); then
                if [ "$attempt" -gt 400 ]; then
                    kill -s KILL "$pid" 2>/dev/null || true
                elif [ $((attempt % 40)) = 1 ]; then # again: it hears nothing while it boots
                    kill -s RTMIN+4 "$pid" 2>/dev/null || true # poweroff.target: units are stopped in order
                fi
            fi
            sleep 0.05
        done
        rm -f "$MACHINE/unshare.pid"
    fi
    if group=$(cat "$MACHINE/cgroup" 2>/dev/null); then
        for attempt in $(seq 100); do
            find "$group" -depth -type d -exec rmdir {} + 2>/dev/null || true
            [ -d "$group" ] || break
            sleep 0.05
        done
        [ ! -d "$group" ] || die "left behind: $group"
        rm -f "$MACHINE/cgroup"
    fi
}

case "${1:-}" in
    check | up | down | stage2) "$@" ;;
    exec)
        shift
        inside "$@"
        ;;
    *) die "usage: $0 check | up [DIR PLACE]... | exec CMD... | down" ;;
esac
