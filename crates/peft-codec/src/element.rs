//! The number formats that weights have before and after: fp32, bf16, fp16.

use half::{bf16, f16};

/// A floating-point number that is converted to fp32 exactly, and back with one rounding to the nearest, ties to even.
pub trait Element: Copy + Default + Send + Sync + 'static + private::Kind {
    /// As fp32.
    fn wide(self) -> f32;
    /// Rounded.
    fn round(value: f32) -> Self;
}

pub(crate) mod private {
    /// Which of the three it is, for the forms that are written for one each.
    pub trait Kind {
        /// The format.
        const FORMAT: Format;
    }

    /// The three.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub enum Format {
        /// fp32.
        Single,
        /// bf16.
        Brain,
        /// fp16.
        Half,
    }
}

macro_rules! element {
    ($type:ty, $format:ident, $wide:expr, $round:expr) => {
        impl private::Kind for $type {
            const FORMAT: private::Format = private::Format::$format;
        }
        impl Element for $type {
            #[inline]
            fn wide(self) -> f32 {
                $wide(self)
            }
            #[inline]
            fn round(value: f32) -> $type {
                $round(value)
            }
        }
    };
}

element!(f32, Single, |x| x, |x| x);
element!(bf16, Brain, bf16::to_f32, bf16::from_f32);
element!(f16, Half, f16::to_f32, f16::from_f32);
