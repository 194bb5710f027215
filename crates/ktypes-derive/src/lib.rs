//! `#[derive(KernelType)]`: see `ktypes::KernelType` for what it is and how it is used.
//!
//! **In:** a Rust struct with named fields and `#[kernel(…)]` attributes. **Out:** an
//! implementation of `ktypes::KernelType`: a table of the fields (paths, sizes) that is bound to
//! the dead kernel's BTF at run time, and a decoder that takes the fields out of one block of
//! bytes. **Never:** knows an offset.

use proc_macro2::TokenStream;
use quote::quote;
use syn::{Data, DeriveInput, Field, Fields, GenericArgument, LitStr, PathArguments, Type};

/// Binds a struct to a kernel structure.
///
/// On the struct, `#[kernel("task_struct")]` names the kernel's structure (the name of a struct,
/// union or typedef). On a field, `#[kernel(…)]` takes, all optional:
///
/// - `"path.to.member"`: the member, if it has another name than the field. Anonymous members are
///   looked through; `[n]` picks an array's element.
/// - `or = "other.path"`: where it is in other kernel versions; may be repeated, the first that
///   exists counts.
/// - `optional`: the field is an `Option`, `None` where the kernel does not have it.
/// - `address`: the field (a `u64`) is the member's address instead of its value.
/// - `nested`: the field is itself a `KernelType`, embedded in this structure.
#[proc_macro_derive(KernelType, attributes(kernel))]
pub fn derive_kernel_type(input: proc_macro::TokenStream) -> proc_macro::TokenStream {
    let input = syn::parse_macro_input!(input as DeriveInput);
    expand(&input).unwrap_or_else(|error| error.to_compile_error()).into()
}

fn expand(input: &DeriveInput) -> syn::Result<TokenStream> {
    let name = &input.ident;
    let Data::Struct(data) = &input.data else {
        return Err(syn::Error::new_spanned(name, "KernelType is for structs"));
    };
    let Fields::Named(fields) = &data.fields else {
        return Err(syn::Error::new_spanned(name, "KernelType needs named fields"));
    };
    if !input.generics.params.is_empty() {
        return Err(syn::Error::new_spanned(&input.generics, "KernelType takes no generics"));
    }
    let kernel_name = struct_name(input)?;

    let mut specs = Vec::new();
    let mut inits = Vec::new();
    for (index, field) in fields.named.iter().enumerate() {
        let options = FieldOptions::parse(field)?;
        let ident = field.ident.as_ref().expect("named field");
        let ty = match (options.optional, inner_of_option(&field.ty)) {
            (true, Some(inner)) => inner,
            (false, None) => &field.ty,
            (true, None) => {
                return Err(syn::Error::new_spanned(&field.ty, "`optional` needs an Option"));
            }
            (false, Some(_)) => {
                return Err(syn::Error::new_spanned(&field.ty, "an Option needs `optional`"));
            }
        };
        let rust_name = ident.to_string();
        let rust_name = rust_name.trim_start_matches("r#");
        let mut paths = options.paths;
        if paths.is_empty() {
            paths.push(rust_name.to_owned());
        }
        paths.extend(options.alternatives);
        let optional = options.optional;
        let (kind, method) = match options.kind {
            Kind::Value => (
                quote!(::ktypes::FieldKind::Value {
                    size: <#ty as ::ktypes::KernelValue>::SIZE,
                }),
                if optional { quote!(optional_value) } else { quote!(value) },
            ),
            Kind::Address => (
                quote!(::ktypes::FieldKind::Address),
                if optional { quote!(optional_address) } else { quote!(address) },
            ),
            Kind::Nested => (
                quote!(::ktypes::FieldKind::Nested {
                    fields: <#ty as ::ktypes::KernelType>::FIELDS,
                }),
                if optional { quote!(optional_nested) } else { quote!(nested) },
            ),
        };
        specs.push(quote! {
            ::ktypes::FieldSpec {
                name: #rust_name,
                paths: &[#(#paths),*],
                optional: #optional,
                kind: #kind,
            }
        });
        inits.push(quote!(#ident: decoder.#method(#index)));
    }

    Ok(quote! {
        impl ::ktypes::KernelType for #name {
            const NAME: &'static str = #kernel_name;
            const FIELDS: &'static [::ktypes::FieldSpec] = &[#(#specs),*];
            fn decode(decoder: &::ktypes::Decoder<'_>) -> Self {
                Self { #(#inits),* }
            }
        }
    })
}

fn struct_name(input: &DeriveInput) -> syn::Result<String> {
    let mut name = None;
    for attribute in input.attrs.iter().filter(|a| a.path().is_ident("kernel")) {
        let literal: LitStr = attribute.parse_args()?;
        if name.replace(literal.value()).is_some() {
            return Err(syn::Error::new_spanned(attribute, "named twice"));
        }
    }
    name.ok_or_else(|| {
        syn::Error::new_spanned(&input.ident, "missing #[kernel(\"name_of_the_kernel_struct\")]")
    })
}

enum Kind {
    Value,
    Address,
    Nested,
}

struct FieldOptions {
    paths: Vec<String>,
    alternatives: Vec<String>,
    optional: bool,
    kind: Kind,
}

impl FieldOptions {
    fn parse(field: &Field) -> syn::Result<FieldOptions> {
        let mut options =
            FieldOptions { paths: Vec::new(), alternatives: Vec::new(), optional: false, kind: Kind::Value };
        for attribute in field.attrs.iter().filter(|a| a.path().is_ident("kernel")) {
            attribute.parse_args_with(|input: syn::parse::ParseStream<'_>| {
                while !input.is_empty() {
                    if input.peek(LitStr) {
                        options.paths.push(input.parse::<LitStr>()?.value());
                    } else {
                        let word: syn::Ident = input.call(syn::ext::IdentExt::parse_any)?;
                        match word.to_string().as_str() {
                            "or" => {
                                input.parse::<syn::Token![=]>()?;
                                options.alternatives.push(input.parse::<LitStr>()?.value());
                            }
                            "optional" => options.optional = true,
                            "address" => options.kind = Kind::Address,
                            "nested" => options.kind = Kind::Nested,
                            _ => {
                                return Err(syn::Error::new(
                                    word.span(),
                                    "expected a path, `or = \"path\"`, `optional`, `address` \
                                     or `nested`",
                                ));
                            }
                        }
                    }
                    if !input.is_empty() {
                        input.parse::<syn::Token![,]>()?;
                    }
                }
                Ok(())
            })?;
        }
        Ok(options)
    }
}

/// `T` of `Option<T>`, by its spelling.
fn inner_of_option(ty: &Type) -> Option<&Type> {
    let Type::Path(path) = ty else { return None };
    let last = path.path.segments.last()?;
    if last.ident != "Option" {
        return None;
    }
    let PathArguments::AngleBracketed(arguments) = &last.arguments else { return None };
    match arguments.args.first()? {
        GenericArgument::Type(inner) => Some(inner),
        _ => None,
    }
}
