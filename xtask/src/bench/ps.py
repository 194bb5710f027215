# What `otherworld inspect ps` shows, by drgn.
from drgn.helpers.linux.fs import d_path
from drgn.helpers.linux.list import list_for_each_entry
from drgn.helpers.linux.mm import task_rss
from drgn.helpers.linux.pid import for_each_task
from drgn.helpers.linux.sched import task_state_to_char

PF_KTHREAD = 0x200000

for leader in for_each_task(prog):
    if leader.group_leader != leader or leader.flags & PF_KTHREAD:
        continue
    signal = leader.signal
    pgid, sid = (signal.pids[n].numbers[0].nr.value_() for n in (2, 3))
    threads, exe, pages, swapped = 0, "", "-", "-"
    for thread in list_for_each_entry("struct task_struct", signal.thread_head.address_of_(), "thread_node"):
        threads += not thread.exit_state
    if leader.mm:
        rss = task_rss(prog, leader)
        pages, swapped = rss.total, rss.swap
        if leader.mm.exe_file:
            exe = d_path(leader.mm.exe_file.f_path).decode()
    print(
        leader.pid.value_(), leader.real_parent.tgid.value_(), pgid, sid, leader.real_cred.uid.val.value_(),
        threads, pages, swapped, task_state_to_char(leader), leader.comm.string_().decode(), exe,
    )
