//! What can go wrong when a dead kernel is asked something.

/// Why the dead kernel did not answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The core itself.
    #[error(transparent)]
    Core(#[from] vmcore::Error),
    /// vmcoreinfo does not say where the symbol table is, or it is damaged.
    #[error("Linux {release}: no usable kallsyms: {why}")]
    NoKallsyms {
        /// The dead kernel's release.
        release: String,
        /// What is wrong.
        why: String,
    },
    /// The kernel was built without CONFIG_DEBUG_INFO_BTF, or its BTF is not in the core.
    #[error("Linux {release}: no BTF: {why}; the kernel must have CONFIG_DEBUG_INFO_BTF")]
    NoBtf {
        /// The dead kernel's release.
        release: String,
        /// What is wrong.
        why: String,
    },
    /// BTF is there, but damaged or of an unknown version.
    #[error("unusable BTF: {0}")]
    BadBtf(String),
    /// BTF has no structure, union or typedef of that name.
    #[error("Linux {release} has no type `{name}`")]
    MissingType {
        /// The dead kernel's release.
        release: String,
        /// The type.
        name: String,
    },
    /// The structure has no such member, under any of its known names.
    #[error("Linux {release}: `{type_name}` has no member `{}`", paths.join("` or `"))]
    MissingMember {
        /// The dead kernel's release.
        release: String,
        /// The structure.
        type_name: String,
        /// The member's path and its alternatives.
        paths: Vec<String>,
    },
    /// The member is there, but not of the size that its Rust declaration expects.
    #[error(
        "Linux {release}: `{type_name}.{member}` has {found} {unit}, but its declaration expects \
         {expected}"
    )]
    WrongSize {
        /// The dead kernel's release.
        release: String,
        /// The structure.
        type_name: String,
        /// The member's path.
        member: String,
        /// What the declaration expects.
        expected: u64,
        /// What BTF says.
        found: u64,
        /// `bytes`, or `bits` for bit-fields.
        unit: &'static str,
    },
    /// A member that is declared `nested` is not a structure.
    #[error("Linux {release}: `{type_name}.{member}` is not a structure")]
    NotAStruct {
        /// The dead kernel's release.
        release: String,
        /// The structure.
        type_name: String,
        /// The member's path.
        member: String,
    },
    /// BTF has no enumerator of that name.
    #[error("Linux {release} has no enumerator `{name}`")]
    MissingEnumerator {
        /// The dead kernel's release.
        release: String,
        /// The enumerator, with its enum if one was given.
        name: String,
    },
    /// The symbol table has no such name.
    #[error("Linux {release} has no symbol `{name}`")]
    MissingSymbol {
        /// The dead kernel's release.
        release: String,
        /// The symbol.
        name: String,
    },
    /// Memory at a kernel address cannot be read.
    #[error("cannot read {len} bytes at {addr:#x}{}", what.map(|w| format!(" (a {w})")).unwrap_or_default())]
    Unreadable {
        /// First byte.
        addr: u64,
        /// How many were wanted.
        len: usize,
        /// The structure that should be there, if one was read.
        what: Option<&'static str>,
        /// Why not.
        source: vmcore::Error,
    },
    /// More bytes were asked for than one read may return.
    #[error("{len} bytes at {addr:#x} are more than one read may return ({max})")]
    TooLong {
        /// First byte.
        addr: u64,
        /// How many were wanted.
        len: usize,
        /// How many are allowed.
        max: usize,
    },
    /// A linked list is damaged.
    #[error("the list at {head:#x} is damaged: {why}")]
    CorruptList {
        /// Address of the list's head.
        head: u64,
        /// What was met.
        why: Corruption,
    },
    /// A tree (rb-tree, xarray, maple tree) is damaged.
    #[error("the {kind} at {root:#x} is damaged: {why}")]
    CorruptTree {
        /// `rb-tree`, `xarray` or `maple tree`.
        kind: &'static str,
        /// Address of the tree.
        root: u64,
        /// What was met.
        why: Corruption,
    },
    /// A number that a kernel structure holds cannot be right.
    #[error("{what} is {value:#x}, which cannot be")]
    Implausible {
        /// What the number is.
        what: String,
        /// Its value.
        value: u64,
    },
}

/// What is wrong with a list or tree.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Corruption {
    /// A node comes up twice.
    #[error("it comes back to {node:#x}")]
    Cycle {
        /// The node.
        node: u64,
    },
    /// More elements than the caller allows.
    #[error("it has more than {max} elements")]
    TooLong {
        /// The caller's limit.
        max: usize,
    },
    /// Deeper than such a tree can be.
    #[error("it is deeper than {max} levels")]
    TooDeep {
        /// The limit.
        max: usize,
    },
    /// A pointer that cannot be one.
    #[error("a pointer leads to {node:#x}, which is {why}")]
    WildPointer {
        /// Where it leads.
        node: u64,
        /// Why that is no place for a node.
        why: String,
    },
    /// A node whose contents make no sense.
    #[error("the node at {node:#x} {why}")]
    BadNode {
        /// The node.
        node: u64,
        /// What is wrong with it.
        why: String,
    },
}

/// Shorthand.
pub type Result<T, E = Error> = std::result::Result<T, E>;
