#!/usr/bin/env python3
"""Hosts of their own in network namespaces, joined by TUN devices and a relay that delays and loses real IP packets.

Each namespace belongs to a holder process, which the kernel kills when its parent dies, and has one TUN device, which
goes with the namespace: nothing is left behind, however this ends. Needs CAP_NET_ADMIN and CAP_SYS_ADMIN and
/dev/net/tun; without, says which is lacking.
"""

import array
import ctypes
import fcntl
import heapq
import os
import random
import select
import signal
import socket
import struct
import subprocess
import threading
import time

CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG = 1
TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
MTU = 1500

libc = ctypes.CDLL(None, use_errno=True)


class Lacking(Exception):
    """This host cannot do it; says what is missing."""


def die_with_parent():
    """For preexec_fn: the process is killed when the thread that started it ends."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def missing_capability():
    """What this host lacks, or None."""
    if not os.path.exists("/dev/net/tun"):
        return "/dev/net/tun"
    bits = next(int(line.split()[1], 16) for line in open("/proc/self/status") if line.startswith("CapEff:"))
    for bit, name in ((12, "CAP_NET_ADMIN"), (21, "CAP_SYS_ADMIN")):
        if not bits >> bit & 1:
            return name
    return None


class Host:
    """A network namespace with the address 10.77.0.INDEX on a TUN device, whose other end is `self.tun`."""

    def __init__(self, index):
        self.address = f"10.77.0.{index}"
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.holder = os.fork()
        if self.holder == 0:
            os.setsid()
            die_with_parent()
            self._hold(theirs)
        theirs.close()
        fds = array.array("i")
        message, ancillary, _, _ = ours.recvmsg(1024, socket.CMSG_SPACE(4))
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(data[:4])
        if not fds:
            raise Lacking(message.decode() or "a network namespace")
        self.tun = fds[0]
        os.set_blocking(self.tun, False)

    def _hold(self, parent):
        """In the holder: makes the namespace and the device, hands the device over, and waits."""
        try:
            if libc.unshare(CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "unshare")
            tun = os.open("/dev/net/tun", os.O_RDWR)
            fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", b"tun0", IFF_TUN | IFF_NO_PI))
            for command in (
                ["ip", "link", "set", "lo", "up"],
                ["ip", "addr", "add", f"{self.address}/24", "dev", "tun0"],
                ["ip", "link", "set", "tun0", "mtu", str(MTU), "up"],
            ):
                subprocess.run(command, check=True, capture_output=True)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [tun]))]
            parent.sendmsg([b"ready"], rights)
        except (OSError, subprocess.CalledProcessError) as error:
            parent.sendall(f"a network namespace with a TUN device: {error}".encode())
            os._exit(1)
        while True:
            signal.pause()

    def popen(self, command, **options):
        """Starts a command on this host; it is killed when this process is."""
        inside = ["nsenter", f"--net=/proc/{self.holder}/ns/net", *command]
        return subprocess.Popen(inside, preexec_fn=die_with_parent, **options)

    def run(self, command):
        """Runs a command on this host to its end."""
        inside = ["nsenter", f"--net=/proc/{self.holder}/ns/net", *command]
        return subprocess.run(inside, check=True, capture_output=True, text=True, preexec_fn=die_with_parent)

    def drop_from(self, address):
        """Packets from `address` are dropped from now on: half of a partition. `ip` and `nft` see to it."""
        self.run(["nft", "add", "table", "ip", "cut"])
        self.run(["nft", "add", "chain", "ip", "cut", "in", "{ type filter hook input priority 0 ; }"])
        self.run(["nft", "add", "rule", "ip", "cut", "in", "ip", "saddr", address, "counter", "drop"])

    def dropped(self):
        """Packets that `drop_from` has dropped."""
        words = self.run(["nft", "list", "table", "ip", "cut"]).stdout.split()
        return int(words[words.index("packets") + 1])

    def heal(self):
        """Nothing is dropped any more."""
        self.run(["nft", "delete", "table", "ip", "cut"])

    def close(self):
        os.close(self.tun)
        os.kill(self.holder, signal.SIGKILL)
        os.waitpid(self.holder, 0)


class Relay(threading.Thread):
    """Carries packets between hosts by their destination; each is lost with `loss` or comes `delay` seconds later."""

    def __init__(self, hosts, delay=0.0, loss=0.0, seed=0):
        super().__init__(daemon=True)
        self.by_address = {socket.inet_aton(host.address): host.tun for host in hosts}
        self.delay, self.loss, self.random = delay, loss, random.Random(seed)
        self.carried = self.lost = 0
        self.stop_reading, self.stop_writing = os.pipe()

    def run(self):
        poll = select.poll()
        for tun in self.by_address.values():
            poll.register(tun, select.POLLIN)
        poll.register(self.stop_reading, select.POLLIN)
        waiting, number = [], 0
        while True:
            now = time.monotonic()
            while waiting and waiting[0][0] <= now:
                _, _, tun, packet = heapq.heappop(waiting)
                try:
                    os.write(tun, packet)
                    self.carried += 1
                except BlockingIOError:
                    self.lost += 1
            pause = max(0.0, waiting[0][0] - time.monotonic()) * 1000 if waiting else None
            for tun, _ in poll.poll(pause):
                if tun == self.stop_reading:
                    return
                while True:
                    try:
                        packet = os.read(tun, MTU + 100)
                    except BlockingIOError:
                        break
                    to = self.by_address.get(packet[16:20]) if packet[0] >> 4 == 4 else None
                    if to is None:
                        continue
                    if self.random.random() < self.loss:
                        self.lost += 1
                        continue
                    number += 1
                    heapq.heappush(waiting, (time.monotonic() + self.delay, number, to, packet))

    def close(self):
        os.write(self.stop_writing, b"x")
        self.join()
        os.close(self.stop_reading)
        os.close(self.stop_writing)
