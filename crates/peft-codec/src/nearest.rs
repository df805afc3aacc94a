//! The nearest of the 256 values of a known map, without a search.

use std::sync::LazyLock;

use crate::map::Map;

/// The search among the magnitudes of a map as one lookup and one comparison.
///
/// A number's bits from its sign down to some of the mantissa choose an entry; these intervals are so short that each holds at
/// most one of the thresholds between values. The sum of the entry and the bits has the answer in its highest byte: the count of
/// thresholds below the interval, and one more where what is below that byte overflows, since the bits are above the threshold
/// inside.
pub(crate) struct Nearest {
    pub(crate) entries: Vec<u32>,
    /// Bits of the mantissa that are compared.
    pub(crate) rest: u32,
}

/// Magnitudes below this are the value zero in both maps.
pub(crate) const LEAST: u32 = 0x3400_0000; // 2^-23

pub(crate) static SIGNED: LazyLock<Nearest> =
    LazyLock::new(|| Nearest::of(&Map::signed().values()[127..], 1));
pub(crate) static UNSIGNED: LazyLock<Nearest> =
    LazyLock::new(|| Nearest::of(Map::unsigned().values(), 0));

/// As [`Nearest`], for every pattern of bits, so that nothing is clamped: of an optimiser's states over their scale, [`MEAN`] and
/// [`SQUARES`].
///
/// The highest byte of the sum is the code; of the mean, whose codes run down where it is negative, it is the code of a
/// positive number, 127 or more, and 126 less the code of a negative one.
#[cfg(any(target_arch = "x86_64", test))]
pub(crate) struct Direct<const REST: u32> {
    entries: Vec<u32>,
}

/// Of means, by the rule that a code has the sign of its number.
#[cfg(any(target_arch = "x86_64", test))]
pub(crate) static MEAN: LazyLock<Direct<17>> = LazyLock::new(|| {
    let (zero, none) = (127, [255, 126]);
    Direct::of(
        &SIGNED,
        |negative, steps| match negative {
            false => zero + steps,
            true => steps.clamp(1, 127) - 1,
        },
        none,
    )
});

/// Of squares.
#[cfg(any(target_arch = "x86_64", test))]
pub(crate) static SQUARES: LazyLock<Direct<16>> = LazyLock::new(|| {
    Direct::of(
        &UNSIGNED,
        |negative, steps| if negative { 0 } else { steps },
        [0, 0],
    )
});

#[cfg(any(target_arch = "x86_64", test))]
impl<const REST: u32> Direct<REST> {
    /// `byte` is that of a sign and a count of thresholds below, `none` that of NaN by its sign.
    fn of(nearest: &Nearest, byte: impl Fn(bool, u32) -> u32, none: [u32; 2]) -> Direct<REST> {
        assert_eq!(nearest.rest, REST);
        let entry = |place: u32| {
            let begin = place << REST;
            let (magnitude, negative) = (begin & 0x7fff_ffff, begin >> 31 == 1);
            if magnitude >= f32::INFINITY.to_bits() {
                return (none[usize::from(negative)] << 24).wrapping_sub(begin);
            }
            let last = magnitude + ((1 << REST) - 1);
            let [first, last] = [magnitude, last].map(|bits| byte(negative, nearest.rank(bits)));
            // The first number of the interval whose byte is the next, or one that is not in it.
            let (mut above, mut end) = (1 << 24, 0);
            if first != last {
                (above, end) = (0, 1 << REST);
            }
            while above < end {
                let middle = (above + end) / 2;
                match byte(negative, nearest.rank(magnitude + middle)) == first {
                    true => above = middle + 1,
                    false => end = middle,
                }
            }
            ((first << 24) + ((1 << 24) - above)).wrapping_sub(begin)
        };
        Direct {
            entries: (0..=u32::MAX >> REST).map(entry).collect(),
        }
    }

    /// An entry for each number without its last `REST` bits.
    pub(crate) fn entries(&self) -> &[u32] {
        assert!(self.entries.len() == (u32::MAX >> REST) as usize + 1);
        &self.entries
    }
}

impl Nearest {
    /// Of magnitudes in rising order, of which the first is zero. A tie goes to the even code, and that of zero is `parity`.
    fn of(values: &[f32], parity: usize) -> Nearest {
        let thresholds = values.windows(2).enumerate().map(|(i, pair)| {
            let middle = (pair[0] + pair[1]) * 0.5;
            match (i + parity).is_multiple_of(2) {
                true => middle.to_bits(), // only what is above goes up
                false => middle.to_bits() - 1,
            }
        });
        let thresholds: Vec<u32> = thresholds.collect();
        let one = 1f32.to_bits();
        let fits = |rest: u32| {
            let mut places = thresholds.iter().map(|t| t >> rest);
            let first = places.next();
            places
                .try_fold(first, |last, it| (last < Some(it)).then_some(Some(it)))
                .is_some()
        };
        let rest = (0..=23).rev().find(|rest| fits(*rest)).unwrap_or(0);
        let mut entries = Vec::new();
        for place in LEAST >> rest..=one >> rest {
            let below = thresholds.iter().filter(|t| **t >> rest < place).count();
            let inside = thresholds.iter().find(|t| **t >> rest == place);
            let begin = place << rest;
            // The first number that is above, or one that no number of the interval is.
            let above = inside.map_or(1 << 24, |t| t - begin + 1);
            let entry = ((below as u32) << 24) + ((1 << 24) - above);
            entries.push(entry.wrapping_sub(begin));
        }
        Nearest { entries, rest }
    }

    /// How many thresholds are below a magnitude, given as bits.
    #[inline]
    fn rank(&self, bits: u32) -> u32 {
        let bits = bits.clamp(LEAST, 1f32.to_bits());
        let entry = self.entries[((bits - LEAST) >> self.rest) as usize];
        entry.wrapping_add(bits) >> 24
    }
}

/// As [`Map::nearest`] of the signed map.
pub(crate) fn signed<'a>(all: impl Iterator<Item = (f32, &'a mut u8)>) {
    let nearest = &*SIGNED;
    for (v, code) in all {
        let below = i32::from(v.is_sign_negative()); // no branch, as nobody can foresee a sign
        let steps = (nearest.rank(v.abs().to_bits()) as i32).min(128 - below);
        let number = i32::from(!v.is_nan());
        *code = (number * (127 + (1 - 2 * below) * steps)) as u8;
    }
}

/// As [`Map::nearest`] of the unsigned map.
pub(crate) fn unsigned<'a>(all: impl Iterator<Item = (f32, &'a mut u8)>) {
    let nearest = &*UNSIGNED;
    // What is no number, or negative, is zero.
    all.for_each(|(v, code)| *code = nearest.rank(v.max(0.0).to_bits()) as u8);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_lookup_finds_the_nearest() {
        let maps = [
            (Map::signed(), &*SIGNED, 127),
            (Map::unsigned(), &*UNSIGNED, 0),
        ];
        assert_eq!((SIGNED.rest, UNSIGNED.rest), (17, 16)); // the vector form has them as constants
        for (map, nearest, zero) in maps {
            assert!(
                nearest.entries.len() < 4096,
                "it should stay in the first cache"
            );
            let values = &map.values()[zero..];
            let mut all = vec![
                0,
                1,
                LEAST - 1,
                LEAST,
                LEAST + 1,
                1f32.to_bits() - 1,
                1f32.to_bits(),
            ];
            for pair in values.windows(2) {
                let middle = ((pair[0] + pair[1]) * 0.5).to_bits();
                all.extend(middle - 3..=middle + 3);
                all.extend([pair[0].to_bits(), pair[1].to_bits()]);
            }
            all.extend((0..1f32.to_bits()).step_by(1009));
            for bits in all {
                let wanted = u32::from(map.nearest(f32::from_bits(bits))) - zero as u32;
                assert_eq!(nearest.rank(bits), wanted, "{bits:#x}");
                if zero == 127 {
                    let mirrored = 127 - u32::from(map.nearest(-f32::from_bits(bits)));
                    assert_eq!(nearest.rank(bits).min(127), mirrored, "-{bits:#x}");
                }
            }
        }
    }
    #[test]
    fn codes_are_those_of_the_search() {
        let special = [f32::NAN, f32::INFINITY, 0.0, 1.5, f32::MIN_POSITIVE];
        let spread = (0..1u32 << 30).step_by(50_021).map(f32::from_bits);
        for v in special.into_iter().chain(spread).flat_map(|v| [v, -v]) {
            let mut codes = [0; 2];
            signed(std::iter::once((v, &mut codes[0])));
            unsigned(std::iter::once((v, &mut codes[1])));
            let wanted = [Map::signed(), Map::unsigned()].map(|map| map.nearest(v));
            assert_eq!(codes, wanted, "{v:e}");
        }
    }

    /// At both ends of every interval, beside its threshold, and between.
    #[test]
    fn direct_bytes_are_codes_with_the_sign_of_their_number() {
        fn byte<const REST: u32>(direct: &Direct<REST>, bits: u32) -> u32 {
            direct.entries()[(bits >> REST) as usize].wrapping_add(bits) >> 24
        }
        let [mean, squares] = [Map::signed(), Map::unsigned()];
        let places = (0..=u32::MAX >> 16).map(|place| place << 16);
        let near = |map: &Map| -> Vec<u32> {
            let pairs = map.values().windows(2);
            let middles = pairs.map(|pair| ((pair[0] + pair[1]) * 0.5).to_bits());
            middles
                .flat_map(|it| it.saturating_sub(2)..=it + 2)
                .collect()
        };
        let ends = places.flat_map(|begin| [0, 1, 0x5a5a, 0xfffe, 0xffff].map(|i| begin + i));
        for bits in ends.chain(near(mean)).chain(near(squares)) {
            let x = f32::from_bits(bits);
            if x.is_infinite() {
                continue; // no state over its scale
            }
            assert_eq!(byte(&SQUARES, bits), u32::from(squares.nearest(x)), "{x:e}");
            let mut wanted = u32::from(mean.nearest(x));
            match x.is_sign_negative() {
                true if wanted >= 127 => wanted = 126,
                false if wanted < 127 => wanted = 255, // of NaN, whose code is 0
                _ => {}
            }
            let got = byte(&MEAN, bits);
            let got = if got < 127 { 126 - got } else { got };
            assert_eq!(got, wanted, "{x:e}");
        }
    }
}
