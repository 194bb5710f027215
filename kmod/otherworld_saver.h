/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * otherworld_saver: what the register saver leaves in memory.
 *
 * This header is the contract between the module, which writes in the main
 * kernel at the moment of its death, and whoever reads the dead kernel's
 * memory (crates/autopsy/src/saver.rs).  It needs nothing but <linux/types.h>.
 *
 * How to find it
 * --------------
 * Everything lies in ordinary, physically contiguous RAM and is linked by
 * physical addresses, so a reader needs no page table.  The address of the
 * header (struct otherworld_saver_header) is published twice:
 *
 *  - in the running system, as the module parameter
 *    /sys/module/otherworld_saver/parameters/phys.  It prints as *decimal*,
 *    which is how module parameters of type ulong print;
 *  - in the dead system, as the last line of the VMCOREINFO note:
 *    "OWFPU=<address in hexadecimal, no 0x>\n".  The line is appended by the
 *    hook at crash time, so it is there exactly if at least one slot was
 *    filled.  The note's n_descsz has grown by the line's length.
 *
 * All numbers are little endian.  The header never moves and is never freed:
 * the module cannot be unloaded.  It is written once, before the address is
 * published; only slots change, and only in a crash.
 *
 * Reading it
 * ----------
 * This is the memory of a kernel that died: a reader checks magic, version and
 * the sizes, and that all of it lies inside RAM, before it believes a word.
 *
 * Which registers are the thread's?  For the task named by a slot with
 * state == COMPLETE:
 *
 *  - KTHREAD set: no user registers here; ignore the slot;
 *  - FPSTATE_IN_MEMORY set: the kernel had already saved the user's registers
 *    to task->thread.fpu.fpstate (and may have used the CPU's for itself);
 *    believe that memory, not the slot;
 *  - neither: the registers existed in the CPU only; believe the slot.
 *
 * A task that no complete slot names was not running: its fpstate is right.
 * A task that was running on a CPU whose slot is not COMPLETE has lost its
 * registers.  A crash in the middle of a context switch can make @task
 * disagree with the registers: also check that the dead CPU's
 * fpu_fpregs_owner_ctx points to the task's fpu, and that @ip is not inside
 * __switch_to or kernel_fpu_begin_mask.
 */
#ifndef OTHERWORLD_SAVER_H
#define OTHERWORLD_SAVER_H

#include <linux/types.h>

/* "OTHWSAV1" and "OTHWSLT1", as the bytes lie in memory. */
#define OTHERWORLD_SAVER_MAGIC		0x315641535748544fULL
#define OTHERWORLD_SAVER_SLOT_MAGIC	0x31544c535748544fULL

/* Raised when an existing field changes its place or its meaning. */
#define OTHERWORLD_SAVER_VERSION	1

/* The key in the VMCOREINFO note. */
#define OTHERWORLD_SAVER_VMCOREINFO	"OWFPU"

#define OTHERWORLD_SAVER_COMPONENTS	32

/*
 * One XSAVE state component, CPUID leaf 0xD sub-leaf n as it was on the dead
 * machine, so that a dump can be read on another one.  Entries 0 (x87) and
 * 1 (SSE) are all zero: they live in the fixed 512-byte legacy area.  So are
 * those of components that XCR0 does not enable.
 */
struct otherworld_saver_component {
	__u32 offset;	/* EBX: bytes from the area's start, standard format */
	__u32 size;	/* EAX: bytes */
	__u32 flags;	/* ECX: bit 0 supervisor, bit 1 64-byte aligned when compacted */
	__u32 reserved;	/* 0 */
};

/* At the published address.  Page aligned, physically contiguous. */
struct otherworld_saver_header {
	__u64 magic;		/* OTHERWORLD_SAVER_MAGIC */
	__u32 version;		/* OTHERWORLD_SAVER_VERSION */
	__u32 header_size;	/* bytes, slot_phys[] included */
	__u32 cpus;		/* entries in slot_phys[]: nr_cpu_ids */
	__u32 slot_size;	/* bytes of one slot, a multiple of the page size */
	__u32 xsave_offset;	/* of the XSAVE area from the slot's start: 128 */
	__u32 xsave_size;	/* bytes of the XSAVE area: CPUID 0xD.0:EBX, or 512 without XSAVE */
	__u64 xcr0;		/* when the module was loaded; 0 without XSAVE */
	struct otherworld_saver_component component[OTHERWORLD_SAVER_COMPONENTS];
	__u64 slot_phys[];	/* physical address of CPU n's slot; 0: not a possible CPU */
};

/* otherworld_saver_slot.state */
#define OTHERWORLD_SAVER_EMPTY		0	/* this CPU never reached the hook */
#define OTHERWORLD_SAVER_TORN		1	/* it began and did not finish: believe nothing */
#define OTHERWORLD_SAVER_COMPLETE	2

/* otherworld_saver_slot.flags */
#define OTHERWORLD_SAVER_FPSTATE_IN_MEMORY	0x1	/* TIF_NEED_FPU_LOAD was set */
#define OTHERWORLD_SAVER_KTHREAD		0x2	/* PF_KTHREAD: an idle or kernel task */
#define OTHERWORLD_SAVER_NMI			0x4	/* stopped by the crash NMI (or died in one) */
/*
 * @ip and @sp are of user mode.  For people, not for decisions: on the CPU
 * that panicked they are those of panic() itself, whatever it interrupted.
 */
#define OTHERWORLD_SAVER_USER_MODE		0x8

/*
 * One CPU at its death.  Page aligned, physically contiguous, slot_size bytes.
 *
 * The XSAVE area is in the *standard* (not compacted) format, written by one
 * XSAVE with all bits requested: components at the offsets of the header's
 * table.  XSAVE does not store a component that is in its initial state: where
 * its bit in XSTATE_BV (8 bytes at offset 512 of the area) is clear, take the
 * architecture's initial value (x87: FCW 0x37f, FTW empty; the others zero)
 * instead of the bytes, which are zero here.  MXCSR (offset 24) is stored
 * always.  Without XSAVE in the machine (xcr0 == 0) it is a plain FXSAVE area
 * and both legacy components are valid.
 */
struct otherworld_saver_slot {
	__u64 magic;		/* OTHERWORLD_SAVER_SLOT_MAGIC, from the start */
	__u32 state;		/* written last */
	__u32 cpu;		/* the slot's index, from the start */
	__u32 flags;
	__s32 pid;		/* task_struct.pid: the thread's TID in the initial PID namespace */
	__s32 tgid;
	__u32 reserved0;	/* 0 */
	__u64 task;		/* the current task_struct, a kernel virtual address */
	__u64 ip;		/* of the pt_regs handed to crash_save_cpu(); 0: none */
	__u64 sp;
	__u64 fs_base;		/* MSR_FS_BASE: the user's */
	__u64 user_gs_base;	/* MSR_KERNEL_GS_BASE: in the kernel, this is the user's */
	__u64 xcr0;		/* at the crash */
	__u64 tsc;		/* when the slot was completed */
	char comm[16];		/* task_struct.comm, for people */
	__u64 reserved1[3];	/* 0 */
	__u8 xsave[] __attribute__((aligned(64)));
};

#endif /* OTHERWORLD_SAVER_H */
