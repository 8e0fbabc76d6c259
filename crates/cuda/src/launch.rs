//! Parameters of kernels, as their sources have them, and how kernels are launched.

/// As kernels take a stack of matrices.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Mat {
    pub planes: [u64; 5],
    pub grids: u64,
    pub n: i32,
    pub k: i32,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Products {
    pub w: [Mat; 3],
    pub out: [u64; 3],
    pub bias: [u64; 3],
    pub end: [i32; 3],
    pub add: i32,
}

#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Kv {
    pub cache: u64,
    pub k_type: i32,
    pub v_type: i32,
    pub heads: i32,
    pub dim: i32,
    pub k_bytes: i32,
    pub head_bytes: i32,
    pub page_bytes: i32,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Where {
    pub tokens: u64,
    pub pages: u64,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct PlaneTable {
    pub to: [u64; 5],
    pub at: [i32; 5],
    pub len: [i32; 5],
    pub count: i32,
    pub block: i32,
}

/// How many buffers are copied at once.
pub(crate) const PARTS: usize = 6;

/// Buffers that are copied together, in words.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Parts {
    pub to: [u64; PARTS],
    pub from: [u64; PARTS],
    pub words: [i32; PARTS],
}

/// Activations in the q8 form: addresses, 0 where there is no place for them.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Q8 {
    pub codes: u64,
    pub scales: u64,
    pub sums: u64,
}

/// A row on its way to a product: addresses, and where the normalised row goes.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct NormOf {
    pub x: u64,
    pub w: u64,
    pub eps: f32,
    pub k: i32,
    pub out: u64,
    pub q8: Q8,
}

/// A result of attention and its other forms: addresses, 0 where there is no place for one.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Attended {
    pub out: u64,
    pub q8: Q8,
    pub bf16: u64,
}

/// The heads of one projection.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct HeadsOf {
    pub x: u64,
    pub norm: u64,
    pub heads: i32,
}

/// Launches a kernel: `launch!(self, unit, name, grid, block, shared, arguments…)`.
macro_rules! launch {
    ($self:ident, $unit:expr, $name:expr, $grid:expr, $block:expr, $shared:expr, $($arg:expr),+ $(,)?) => {{
        let name: &'static std::ffi::CStr = $name;
        let function = $self.modules.function(&$self.pool.gpu, $unit, name)?;
        launch!(@ $self, name, function, $grid, $block, $shared, [] $($arg),+)
    }};
    (@ $self:ident, $name:ident, $f:ident, $grid:expr, $block:expr, $shared:expr,
     [$($done:ident)*] $arg:expr $(, $rest:expr)*) => {{
        let mut value = $arg;
        launch!(@@ $self, $name, $f, $grid, $block, $shared, [$($done)*] value, $($rest),*)
    }};
    (@@ $self:ident, $name:ident, $f:ident, $grid:expr, $block:expr, $shared:expr,
     [$($done:ident)*] $value:ident, ) => {{
        launch!(@run $self, $name, $f, $grid, $block, $shared, [$($done)* $value])
    }};
    (@@ $self:ident, $name:ident, $f:ident, $grid:expr, $block:expr, $shared:expr,
     [$($done:ident)*] $value:ident, $($rest:expr),+) => {{
        launch!(@ $self, $name, $f, $grid, $block, $shared, [$($done)* $value] $($rest),+)
    }};
    (@run $self:ident, $name:ident, $f:ident, $grid:expr, $block:expr, $shared:expr, [$($v:ident)*]) => {{
        let mut arguments = [$((&raw mut $v).cast::<std::ffi::c_void>()),*];
        // SAFETY: the arguments are those of the kernel in its source; the buffers are as
        // large as the shapes say, which the caller of the trait vouches for.
        unsafe { $self.pool.gpu.launch($name, $f, $grid, $block, $shared, &mut arguments) }
    }};
}

pub(crate) use launch;
