//! Instructions that are changed: the fault models of Rio and Nooks.

use fastrand::Rng;

use crate::Injected;
use iced_x86::{FlowControl, Instruction, Mnemonic, OpKind, Register};

use crate::instruction_of;
use crate::live::{Live, Symbols};
use lab::Guest;
use lab::Result;

/// Faults at a time, as in the literature: many are never reached, or do no harm.
const FAULTS: usize = 16;
const MAX_DRAWS: usize = 400;
const NOP: u8 = 0x90;

/// Code that runs often.
const FUNCTIONS: &[&str] = &[
    // System calls and files.
    "do_syscall_64",
    "syscall_exit_to_user_mode",
    "ksys_read",
    "ksys_write",
    "vfs_read",
    "vfs_write",
    "fdget_pos",
    "__fdget_pos",
    "fput",
    "pipe_read",
    "pipe_write",
    "do_filp_open",
    "path_openat",
    "link_path_walk",
    "walk_component",
    "lookup_fast",
    "step_into",
    "dput",
    "__d_lookup_rcu",
    "generic_perform_write",
    "filemap_read",
    "filemap_get_pages",
    "filemap_map_pages",
    "ext4_da_write_begin",
    "ext4_da_write_end",
    "ext4_file_write_iter",
    "do_epoll_wait",
    "ep_poll_callback",
    "do_sys_poll",
    "do_select",
    "eventfd_read",
    // Memory.
    "handle_mm_fault",
    "__handle_mm_fault",
    "do_anonymous_page",
    "do_wp_page",
    "do_fault",
    "wp_page_copy",
    "get_page_from_freelist",
    "__alloc_pages",
    "__alloc_pages_noprof",
    "rmqueue",
    "free_unref_page",
    "kmem_cache_alloc",
    "kmem_cache_free",
    "kmem_cache_alloc_noprof",
    "__kmalloc",
    "kfree",
    "copy_page_range",
    "unmap_page_range",
    "zap_pte_range",
    "mmap_region",
    "find_vma",
    "mas_walk",
    "mas_next",
    "mas_store_prealloc",
    "page_add_file_rmap",
    "folio_add_lru",
    // Tasks and time.
    "__schedule",
    "schedule",
    "pick_next_task_fair",
    "update_curr",
    "enqueue_task_fair",
    "dequeue_task_fair",
    "try_to_wake_up",
    "select_task_rq_fair",
    "finish_task_switch",
    "context_switch",
    "hrtimer_interrupt",
    "__hrtimer_run_queues",
    "hrtimer_start_range_ns",
    "tick_sched_handle",
    "update_process_times",
    "timekeeping_advance",
    "run_timer_softirq",
    "__do_softirq",
    "handle_softirqs",
    "rcu_core",
    "do_futex",
    "futex_wait",
    "futex_wake",
    "futex_wait_queue",
    "copy_process",
    "dup_task_struct",
    "do_exit",
    "release_task",
    "wait_consider_task",
    "begin_new_exec",
    "load_elf_binary",
    "do_nanosleep",
    "signal_wake_up_state",
    "get_signal",
    "dequeue_signal",
    "send_signal_locked",
    "__send_signal_locked",
    // Sockets.
    "sock_read_iter",
    "sock_write_iter",
    "unix_stream_sendmsg",
    "unix_stream_read_generic",
    "unix_dgram_sendmsg",
    "__alloc_skb",
    "kfree_skb_reason",
    "skb_release_data",
    "tcp_sendmsg_locked",
    "tcp_recvmsg_locked",
    "tcp_rcv_established",
    "tcp_v4_rcv",
    "ip_rcv",
    "__netif_receive_skb_core",
    "net_rx_action",
    // Synchronisation.
    "mutex_lock",
    "mutex_unlock",
    "down_read",
    "up_read",
    "down_write",
    "up_write",
    "__wake_up_common",
    "add_wait_queue",
    "remove_wait_queue",
    "prepare_to_wait_event",
    "virtqueue_add_split",
    "virtblk_done",
    "blk_mq_submit_bio",
    "submit_bio_noacct",
];

/// What is done to an instruction.
#[derive(Clone, Copy, Debug)]
enum Model {
    BitFlip,
    FlippedBranch,
    OffByOne,
    ChangedRegister,
    ChangedImmediate,
    Deleted,
    RemovedInitialisation,
}

const MODELS: [Model; 7] = [
    Model::BitFlip,
    Model::FlippedBranch,
    Model::OffByOne,
    Model::ChangedRegister,
    Model::ChangedImmediate,
    Model::Deleted,
    Model::RemovedInitialisation,
];

pub(super) fn inject(guest: &mut Guest, symbols: &Symbols, draw: &mut Rng) -> Result<Injected> {
    let mut live = Live::stop(&guest.machine, symbols)?;
    let mut done = Vec::new();
    for _ in 0..MAX_DRAWS {
        if done.len() == FAULTS {
            break;
        }
        let (Some(function), Some(model)) = (draw.choice(FUNCTIONS), draw.choice(MODELS)) else { break };
        let Some(at) = instruction_of(&mut live, function, draw)? else { continue };
        let instruction = live.instruction(at)?;
        if instruction.is_invalid() {
            continue;
        }
        let mut bytes = live.read(at, instruction.len())?;
        if change(model, &instruction, &mut bytes, draw).is_none() {
            continue;
        }
        live.write(at, &bytes)?;
        done.push(format!("{model:?} at {}", symbols.name(at)));
    }
    live.leave()?;
    Ok(Injected::Done(done.join(", ")))
}

/// Changes an instruction's bytes; none if the model does not fit it.
fn change(model: Model, instruction: &Instruction, bytes: &mut [u8], draw: &mut Rng) -> Option<()> {
    let branch = instruction.flow_control() == FlowControl::ConditionalBranch;
    match model {
        Model::BitFlip => {
            let byte = draw.choice(bytes.iter_mut())?;
            *byte ^= 1 << draw.u8(..8);
        }
        // The lowest bit of the condition is its opposite.
        Model::FlippedBranch => *condition(branch, bytes)? ^= 1,
        // Below or above: with and without the equal.
        Model::OffByOne if branch => {
            let byte = condition(branch, bytes)?;
            let other = match *byte & 0xf {
                0x2 => 0x6, // b, be
                0x6 => 0x2,
                0x3 => 0x7, // ae, a
                0x7 => 0x3,
                0xc => 0xe, // l, le
                0xe => 0xc,
                0xd => 0xf, // ge, g
                0xf => 0xd,
                _ => return None,
            };
            *byte = *byte & 0xf0 | other;
        }
        Model::OffByOne => {
            let byte = immediate(instruction, bytes)?;
            *byte = byte.wrapping_add(1);
        }
        // One of the two in the ModRM byte, of instructions that have a register in it.
        Model::ChangedRegister => {
            let two = instruction.op_count() == 2
                && instruction.op0_register() != Register::None
                && instruction.op1_register() != Register::None;
            let last = bytes.last_mut().filter(|byte| two && **byte >= 0xc0)?;
            *last ^= if draw.bool() { 1 << draw.u8(..3) } else { 8 << draw.u8(..3) };
        }
        Model::ChangedImmediate => {
            let byte = immediate(instruction, bytes)?;
            *byte ^= 1 << draw.u8(..8);
        }
        Model::Deleted => bytes.fill(NOP),
        Model::RemovedInitialisation => {
            let stores = matches!(instruction.mnemonic(), Mnemonic::Mov | Mnemonic::Stosq)
                && instruction.op0_kind() == OpKind::Memory
                && matches!(instruction.memory_base(), Register::RSP | Register::RBP);
            let clears = instruction.mnemonic() == Mnemonic::Xor
                && instruction.op0_register() == instruction.op1_register()
                && instruction.op0_register() != Register::None;
            if !stores && !clears {
                return None;
            }
            bytes.fill(NOP);
        }
    }
    Some(())
}

/// The byte with the condition of a jump: 7x, or 0f 8x.
fn condition(branch: bool, bytes: &mut [u8]) -> Option<&mut u8> {
    let at = bytes.iter().position(|byte| byte >> 4 == 7 || byte >> 4 == 8)?;
    bytes.get_mut(at).filter(|_| branch)
}

/// The lowest byte of an immediate operand, which comes last.
fn immediate<'a>(instruction: &Instruction, bytes: &'a mut [u8]) -> Option<&'a mut u8> {
    let size = match instruction.op_kind(instruction.op_count().checked_sub(1)?) {
        OpKind::Immediate8 | OpKind::Immediate8to16 | OpKind::Immediate8to32 | OpKind::Immediate8to64 => 1,
        OpKind::Immediate16 => 2,
        OpKind::Immediate32 | OpKind::Immediate32to64 => 4,
        OpKind::Immediate64 => 8,
        _ => return None,
    };
    let at = bytes.len().checked_sub(size)?;
    bytes.get_mut(at)
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions};

    use super::*;

    fn changed(model: Model, bytes: &[u8]) -> Option<Vec<u8>> {
        let instruction = Decoder::with_ip(64, bytes, 0, DecoderOptions::NONE).decode();
        assert_eq!(instruction.len(), bytes.len());
        let mut after = bytes.to_vec();
        change(model, &instruction, &mut after, &mut Rng::with_seed(1))?;
        Some(after)
    }

    #[test]
    fn branches_are_turned_round() {
        let (je, jne_far) = ([0x74, 0x10], [0x0f, 0x85, 1, 2, 0, 0]);
        assert_eq!(changed(Model::FlippedBranch, &je).unwrap(), [0x75, 0x10]);
        assert_eq!(changed(Model::FlippedBranch, &jne_far).unwrap(), [0x0f, 0x84, 1, 2, 0, 0]);
        assert_eq!(changed(Model::OffByOne, &[0x7c, 5]).unwrap(), [0x7e, 5], "jl becomes jle");
        assert_eq!(changed(Model::OffByOne, &je), None);
    }

    #[test]
    fn a_model_that_does_not_fit_changes_nothing() {
        let (mov, cmp) = ([0x48, 0x89, 0xc3], [0x83, 0xf8, 0x07]);
        assert_eq!(changed(Model::FlippedBranch, &mov), None);
        assert_eq!(changed(Model::ChangedImmediate, &mov), None);
        assert_eq!(changed(Model::RemovedInitialisation, &mov), None);
        assert_eq!(changed(Model::OffByOne, &cmp).unwrap(), [0x83, 0xf8, 0x08]);
        assert_ne!(changed(Model::ChangedRegister, &mov).unwrap(), mov);
        assert_eq!(changed(Model::Deleted, &mov).unwrap(), [NOP; 3]);
        assert_eq!(changed(Model::RemovedInitialisation, &[0x31, 0xc0]).unwrap(), [NOP; 2], "xor eax, eax");
    }

    #[test]
    fn a_flipped_bit_is_one_bit() {
        let before = [0x48, 0x8b, 0x45, 0xf8];
        let after = changed(Model::BitFlip, &before).unwrap();
        let flipped: u32 = before.iter().zip(&after).map(|(a, b)| (a ^ b).count_ones()).sum();
        assert_eq!(flipped, 1);
    }
}
