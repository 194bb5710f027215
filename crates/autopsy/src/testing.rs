//! Fake dead kernels with the structures that this crate reads.

use std::collections::BTreeMap;

use ktypes::{FieldKind, FieldSpec, Kernel, KernelType};
use synth::{Record, Synth, Type, U8, U16, U32, U64, array, named};

/// Opens what was built.
pub(crate) fn open(synth: &Synth) -> Kernel {
    Kernel::open(synth.build()).expect("a fake kernel that can be opened")
}

/// A structure's members: plain ones, and structures within it.
#[derive(Default)]
struct Tree {
    members: BTreeMap<String, Node>,
}

enum Node {
    Leaf(Type),
    Branch(Tree),
}

/// Declares the kernel structure that `T` is bound to, with every member that it asks for. `types` says what members of
/// these names are, where their use does not tell.
pub(crate) fn declare<T: KernelType>(synth: &mut Synth, types: &[(&str, Type)]) {
    let mut tree = Tree::default();
    for field in T::FIELDS {
        if let Some(path) = field.paths.first() {
            let parts: Vec<&str> =
                path.split('.').map(|part| part.split('[').next().unwrap_or(part)).collect();
            add(&mut tree, &parts, || leaf(field, path.contains('[')), types);
        }
    }
    for (name, ty) in types {
        if !tree.contains(name) {
            tree.members.insert((*name).to_owned(), Node::Leaf(ty.clone()));
        }
    }
    let record = build(synth, T::NAME, tree);
    synth.structure(T::NAME, record);
}

impl Tree {
    fn contains(&self, name: &str) -> bool {
        self.members
            .iter()
            .any(|(own, node)| own == name || matches!(node, Node::Branch(tree) if tree.contains(name)))
    }
}

fn add(tree: &mut Tree, parts: &[&str], leaf: impl FnOnce() -> Type, types: &[(&str, Type)]) {
    let Some((first, rest)) = parts.split_first() else { return };
    let told = types.iter().find(|(name, _)| name == first).map(|(_, ty)| ty.clone());
    if let Some(ty) = told {
        tree.members.insert((*first).to_owned(), Node::Leaf(ty));
    } else if rest.is_empty() {
        tree.members.entry((*first).to_owned()).or_insert_with(|| Node::Leaf(leaf()));
    } else {
        let node = tree.members.entry((*first).to_owned()).or_insert_with(|| Node::Branch(Tree::default()));
        if !matches!(node, Node::Branch(_)) {
            *node = Node::Branch(Tree::default());
        }
        if let Node::Branch(branch) = node {
            add(branch, rest, leaf, types);
        }
    }
}

fn leaf(field: &FieldSpec, indexed: bool) -> Type {
    let one = match &field.kind {
        FieldKind::Value { size: 1 } => U8,
        FieldKind::Value { size: 2 } => U16,
        FieldKind::Value { size: 4 } => U32,
        FieldKind::Value { size: 8 } => U64,
        FieldKind::Value { size } => array(U8, *size as u32),
        _ => array(U64, 2),
    };
    if indexed { array(one, 8) } else { one }
}

fn build(synth: &mut Synth, name: &str, tree: Tree) -> Record {
    let mut record = Record::new();
    for (member, node) in tree.members {
        let ty = match node {
            Node::Leaf(ty) => ty,
            Node::Branch(branch) => {
                let inner = format!("{name}_{member}");
                let inner_record = build(synth, &inner, branch);
                synth.structure(&inner, inner_record);
                // Arrays of structures are asked for by element.
                if member == "it" { array(named(&inner), 2) } else { named(&inner) }
            }
        };
        record = record.field(&member, ty);
    }
    record
}
