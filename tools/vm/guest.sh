#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# The first program of a test machine. Runs /out/command.sh; what it prints goes to the harness, its exit code to
# /out/status, the kernel's log to /out/dmesg.txt.

# There is no udev here, which would have loaded the driver and named the ports.
modprobe --quiet virtio_console
for port in /sys/class/virtio-ports/*; do
    if [ "$(cat "$port/name")" = virtme.stdout ]; then
        exec >"/dev/${port##*/}" 2>&1
    fi
done

export PATH=/opt/kptrace/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export HOME=/root LANG=C.UTF-8 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
# As on a node. What kptrace would write there must not need the root to be writable.
mountpoint --quiet /sys/fs/bpf || mount -t bpf bpf /sys/fs/bpf
mkdir -p /run/netns
cd /repo || exit

echo "kptrace-vm-ready $(uname -r)"
bash /out/command.sh </dev/null
status=$?
dmesg >/out/dmesg.txt
# Last: a machine without a status did not end by itself.
echo "$status" >/out/status
