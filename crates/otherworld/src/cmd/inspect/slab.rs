//! `inspect slab-summary`

use autopsy::SlabCache;

pub fn text(caches: &[SlabCache]) -> String {
    // As slabtop(1): the largest first.
    let mut caches: Vec<&SlabCache> = caches.iter().collect();
    caches.sort_by(|a, b| b.bytes.cmp(&a.bytes).then_with(|| a.name.cmp(&b.name)));
    let rows = caches.iter().map(|c| {
        let used = c.reserved.map_or_else(|| "?".to_owned(), |r| c.active.saturating_sub(r).to_string());
        [
            c.name.clone(),
            c.object_size.to_string(),
            used,
            c.active.to_string(),
            c.objects.to_string(),
            c.slabs.to_string(),
            c.objects_per_slab.to_string(),
            (c.bytes / 1024).to_string(),
        ]
    });
    let header = ["CACHE", "OBJSIZE", "IN USE", "ACTIVE", "TOTAL", "SLABS", "OBJ/SLAB", "KIB"];
    let mut out = super::table(&header, &[1, 2, 3, 4, 5, 6, 7], rows);
    let bytes: u64 = caches.iter().map(|c| c.bytes).fold(0, u64::saturating_add);
    out.push_str(&format!("{} caches, {} KiB\n", caches.len(), bytes / 1024));
    out
}
