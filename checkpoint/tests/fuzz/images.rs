//! Images, as their reader sees them.

use crate::mutate::{damage, fuzz};
use crate::seeds::seeds;
use checkpoint::image::stream::{Item, Options, StreamReader, StreamWriter};

#[test]
fn the_image_reader() {
    let mut corpus = seeds().images;
    if corpus.is_empty() {
        // Not root: what can be written without a process.
        let mut writer = StreamWriter::new(Vec::new(), Options::default()).expect("starts");
        writer.data(0x1000, &[7; 8192]).expect("written");
        corpus.push(writer.finish().expect("ends").0);
    }
    let small: Vec<Vec<u8>> = corpus.iter().map(|image| image[..image.len().min(300_000)].to_vec()).collect();
    fuzz("images", &small, damage, |input| {
        let Ok(mut reader) = StreamReader::new(input) else { return };
        let Ok(images) = reader.states() else { return };
        assert!(!images.is_empty());
        let _ = checkpoint::dump::tree::blockers(&images);
        while let Ok(item) = reader.next() {
            if matches!(item, Item::End) {
                break;
            }
        }
    });
}
