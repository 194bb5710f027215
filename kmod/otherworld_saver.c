// SPDX-License-Identifier: GPL-2.0
/*
 * otherworld_saver: keep the registers that a panic would lose.
 *
 * When a kernel panics into a crash kernel, a thread that was computing on
 * another CPU has its vector registers in that CPU and nowhere else: kdump
 * saves the general registers only.  This module hooks crash_save_cpu(), which
 * the dying kernel calls on each of its CPUs, and stores there what the XSAVE
 * instruction can see into a slot that was allocated when the module was loaded.
 *
 * While the kernel is healthy nothing of this runs.  In a crash it must assume
 * that locks are held and lists are broken: no lock, no allocation, no printk,
 * nothing but stores into memory that is already its own.
 *
 * otherworld_saver.h describes the memory that it leaves.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/align.h>
#include <linux/atomic.h>
#include <linux/build_bug.h>
#include <linux/cpumask.h>
#include <linux/elf.h>
#include <linux/ftrace.h>
#include <linux/gfp.h>
#include <linux/module.h>
#include <linux/preempt.h>
#include <linux/ptrace.h>
#include <linux/sched.h>
#include <linux/slab.h>
#include <linux/string.h>

#if __has_include(<linux/vmcore_info.h>)
#include <linux/vmcore_info.h>	/* since 6.9 */
#else
#include <linux/crash_core.h>
#endif

#include <asm/cpufeature.h>
#include <asm/fpu/xcr.h>
#include <asm/io.h>
#include <asm/msr.h>
#include <asm/processor.h>

#include "otherworld_saver.h"

#define CPUID_XSTATE 0xd
#define FXSAVE_SIZE 512

static struct otherworld_saver_header *header;
static struct otherworld_saver_slot **slots;

static unsigned long phys;
module_param(phys, ulong, 0400);
MODULE_PARM_DESC(phys, "physical address of the header (read only)");

/* The kernel's VMCOREINFO note: an ELF note, filled only when the kernel crashes. */
static Elf64_Nhdr *note;
static char note_line[32];
static unsigned int note_line_len;
static atomic_t note_busy = ATOMIC_INIT(0);

/*
 * Put the header's address at the end of the VMCOREINFO note.
 *
 * Not earlier than at the crash, because the kernel builds the note then, from
 * text that was fixed at boot.  Usually it has done so before any CPU gets
 * here; with crash_kexec_post_notifiers the other CPUs come first, find the
 * note empty or see their line overwritten, and the panicking CPU, which comes
 * after the kernel has built the note, does it again.
 *
 * Several CPUs can be here at once.  One does the work, the others do not wait:
 * whoever holds the flag might never come back.
 */
static notrace void append_to_vmcoreinfo(void)
{
	char *desc = (char *)(note + 1) + ALIGN(note->n_namesz, 4);
	u32 size, len = note_line_len;

	if (atomic_xchg(&note_busy, 1))
		return;

	size = note->n_descsz;
	if (size >= len && size + len <= VMCOREINFO_BYTES &&
	    memcmp(desc + size - len, note_line, len)) {
		memcpy(desc + size, note_line, len);
		note->n_descsz = size + len;
	}

	atomic_set(&note_busy, 0);
}

/*
 * crash_save_cpu(struct pt_regs *regs, int cpu) was called: on the panicking
 * CPU in whatever context it died, on the others in the crash NMI.
 */
static notrace void save_cpu(unsigned long ip, unsigned long parent_ip,
			     struct ftrace_ops *ops, struct ftrace_regs *fregs)
{
	struct pt_regs *call = ftrace_get_regs(fregs);
	struct pt_regs *regs = call ? (struct pt_regs *)call->di : NULL;
	unsigned int cpu = raw_smp_processor_id();
	struct task_struct *task = current;
	struct otherworld_saver_slot *slot;
	u32 flags = 0;

	if (cpu >= header->cpus)
		return;
	slot = slots[cpu];
	/* Only the first time counts: later the registers may be the kernel's. */
	if (!slot || slot->state != OTHERWORLD_SAVER_EMPTY)
		return;
	WRITE_ONCE(slot->state, OTHERWORLD_SAVER_TORN);
	barrier();

	/*
	 * Registers first; the code below must not get the chance to change them.
	 * Plain XSAVE, not XSAVES: the reader gets one fixed layout.
	 */
	if (header->xcr0) {
		asm volatile("xsave64 %0"
			     : "+m" (slot->xsave)
			     : "a" (-1), "d" (-1)
			     : "memory");
		slot->xcr0 = xgetbv(XCR_XFEATURE_ENABLED_MASK);
	} else {
		asm volatile("fxsave64 %0" : "+m" (slot->xsave) : : "memory");
	}

	if (test_thread_flag(TIF_NEED_FPU_LOAD))
		flags |= OTHERWORLD_SAVER_FPSTATE_IN_MEMORY;
	if (task->flags & PF_KTHREAD)
		flags |= OTHERWORLD_SAVER_KTHREAD;
	if (in_nmi())
		flags |= OTHERWORLD_SAVER_NMI;
	if (regs) {
		if (user_mode(regs))
			flags |= OTHERWORLD_SAVER_USER_MODE;
		slot->ip = regs->ip;
		slot->sp = regs->sp;
	}
	slot->flags = flags;
	slot->pid = task->pid;
	slot->tgid = task->tgid;
	slot->task = (unsigned long)task;
	slot->fs_base = __rdmsr(MSR_FS_BASE);
	slot->user_gs_base = __rdmsr(MSR_KERNEL_GS_BASE);
	memcpy(slot->comm, task->comm, sizeof(slot->comm));
	slot->tsc = rdtsc();

	smp_wmb(); /* COMPLETE must not be seen before what it vouches for. */
	WRITE_ONCE(slot->state, OTHERWORLD_SAVER_COMPLETE);

	append_to_vmcoreinfo();
}

/*
 * A bare ftrace_ops, not a kprobe, which would be skipped if the kernel died
 * inside another probe's handler.  PERMANENT: kernel.ftrace_enabled=0 must not
 * disarm it.
 */
static struct ftrace_ops saver_ops = {
	.func = save_cpu,
	.flags = FTRACE_OPS_FL_SAVE_REGS | FTRACE_OPS_FL_PERMANENT,
};

static u32 __init describe_xsave(void)
{
	u32 eax, ebx, ecx, edx;
	unsigned int i;

	if (!boot_cpu_has(X86_FEATURE_OSXSAVE))
		return FXSAVE_SIZE;

	header->xcr0 = xgetbv(XCR_XFEATURE_ENABLED_MASK);
	for (i = 2; i < OTHERWORLD_SAVER_COMPONENTS; i++) {
		if (!(header->xcr0 & BIT_ULL(i)))
			continue;
		cpuid_count(CPUID_XSTATE, i, &eax, &ebx, &ecx, &edx);
		header->component[i].size = eax;
		header->component[i].offset = ebx;
		header->component[i].flags = ecx;
	}
	/* EBX of sub-leaf 0: the size for what XCR0 enables now. */
	cpuid_count(CPUID_XSTATE, 0, &eax, &ebx, &ecx, &edx);
	return ebx;
}

static void __init free_memory(void)
{
	unsigned int cpu;

	for (cpu = 0; slots && cpu < nr_cpu_ids; cpu++) {
		if (slots[cpu])
			free_pages_exact(slots[cpu], header->slot_size);
	}
	kfree(slots);
	if (header)
		free_pages_exact(header, header->header_size);
}

static int __init allocate_memory(void)
{
	size_t size = struct_size(header, slot_phys, nr_cpu_ids);
	unsigned int cpu;

	/* alloc_pages_exact: contiguous in physical memory, and in the direct map. */
	header = alloc_pages_exact(size, GFP_KERNEL | __GFP_ZERO);
	if (!header)
		return -ENOMEM;
	header->version = OTHERWORLD_SAVER_VERSION;
	header->header_size = size;
	header->cpus = nr_cpu_ids;
	header->xsave_offset = offsetof(struct otherworld_saver_slot, xsave);
	header->xsave_size = describe_xsave();
	header->slot_size = PAGE_ALIGN(header->xsave_offset + header->xsave_size);

	slots = kcalloc(nr_cpu_ids, sizeof(*slots), GFP_KERNEL);
	if (!slots)
		return -ENOMEM;
	for_each_possible_cpu(cpu) {
		slots[cpu] = alloc_pages_exact(header->slot_size, GFP_KERNEL | __GFP_ZERO);
		if (!slots[cpu])
			return -ENOMEM;
		slots[cpu]->magic = OTHERWORLD_SAVER_SLOT_MAGIC;
		slots[cpu]->cpu = cpu;
		header->slot_phys[cpu] = virt_to_phys(slots[cpu]);
	}
	header->magic = OTHERWORLD_SAVER_MAGIC;
	return 0;
}

static int __init saver_init(void)
{
	static_assert(offsetof(struct otherworld_saver_header, component) == 40);
	static_assert(offsetof(struct otherworld_saver_header, slot_phys) == 552);
	static_assert(offsetof(struct otherworld_saver_slot, comm) == 88);
	static_assert(offsetof(struct otherworld_saver_slot, xsave) == 128);
	unsigned long address;
	int err;

	err = allocate_memory();
	if (err)
		goto fail;
	address = virt_to_phys(header);
	note = __va(paddr_vmcoreinfo_note());
	note_line_len = scnprintf(note_line, sizeof(note_line),
				  OTHERWORLD_SAVER_VMCOREINFO "=%lx\n", address);

	err = ftrace_set_filter(&saver_ops, "crash_save_cpu", strlen("crash_save_cpu"), 1);
	if (!err)
		err = register_ftrace_function(&saver_ops);
	if (err) {
		pr_err("cannot hook crash_save_cpu: error %d\n", err);
		goto fail;
	}

	phys = address;
	pr_info("ready: %u CPUs, %u bytes each, header at %#lx\n",
		num_possible_cpus(), header->slot_size, phys);
	return 0;

fail:
	free_memory();
	return err;
}

/*
 * No module_exit, on purpose: once the address is published, a crash kernel may
 * look there at any time.  The kernel refuses to unload a module without one.
 */
module_init(saver_init);

MODULE_DESCRIPTION("Saves the live FPU and vector registers of every CPU when the kernel crashes");
MODULE_AUTHOR("The Otherworld authors");
MODULE_VERSION("1");
MODULE_LICENSE("GPL");
