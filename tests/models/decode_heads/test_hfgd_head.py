"""HFGDHead: what each loss reaches, what each switch changes, and the whole head written out."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.dist import init_dist
from mmengine.model import MMDistributedDataParallel
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import MODELS
from torch import Tensor, nn

from mmseg_fusion.analysis import count
from mmseg_fusion.models.decode_heads import HFGDHead
from tests.distributed import in_processes
from tests.engine.small import runner
from tests.testers import HeadTester, segmentor_config
from tests.testers.toys import toy_features, toy_samples

from .test_context_augmented_encoder import naive_encoder
from .test_semantic_fpn_head import moved_norms, naive_semantic_fpn

LEVELS, STRIDES, SIZE = (8, 16, 32, 64), (4, 8, 16, 32), (96, 96)
ALL = [0, 1, 2, 3]
ENCODER = dict(
    type='ContextAugmentedEncoder', wide_channels=24, attention_channels=12, qk_channels=4
)


@MODELS.register_module()
class OutsideHead(BaseDecodeHead):
    """An upsampler that this project has never seen: two levels, a concatenation, no mmcv."""

    def __init__(self, in_channels, in_index, **kwargs):
        super().__init__(
            in_channels=in_channels,
            in_index=in_index,
            input_transform='multiple_select',
            **kwargs,
        )
        self.mix = nn.Conv2d(sum(self.in_channels), self.channels, 3, padding=1)

    def forward(self, inputs):
        fine, coarse = self._transform_inputs(inputs)
        coarse = F.interpolate(coarse, fine.shape[2:])
        return self.cls_seg(self.mix(torch.cat([fine, coarse], 1)).tanh())


DLV3PLUS = dict(
    type='DepthwiseSeparableASPPHead',
    in_index=3,
    dilations=(1, 2),
    c1_in_channels=LEVELS[0],
    c1_channels=4,
)
FPN = dict(type='FPN', num_outs=4)


# --- what every head owes ------------------------------------------------------------------------


class Guided(HeadTester):
    """With stop-gradients, of all levels the last one alone is trained."""

    head = dict(type='HFGDHead', in_index=ALL, encoder=ENCODER)
    stride = 4
    image_sizes = (SIZE, (33, 47), (50, 31))
    # Once is enough, below.
    compiled = False

    def test_gradient_reaches_every_level(self):
        head, inputs = self.build(), [x.requires_grad_() for x in self.inputs(SIZE)]
        self.loss(head, inputs, SIZE).backward()
        # A gradient of 0, not none: see test_norms_of_single_levels.
        assert [bool(x.grad.any()) for x in inputs] == [False, False, False, True]

    def with_upsampler(self, upsampler: dict, **changes) -> dict:
        return {**HeadTester.config(self, **changes), 'upsampler': dict(upsampler)}


class TestHFGDHead(Guided):
    compiled = True


class TestWithoutEncoder(Guided):
    head = dict(type='HFGDHead', in_index=ALL, encoder=None)


class TestWithoutGuidance(HeadTester):
    head = dict(type='HFGDHead', in_index=ALL, encoder=ENCODER, guidance=False)
    stride = 4
    image_sizes = Guided.image_sizes
    compiled = False


class TestWithoutAxialAttention(Guided):
    head = dict(type='HFGDHead', in_index=ALL, encoder=ENCODER, axial_attention=False)


class TestWithoutStopGradient(HeadTester):
    head = dict(type='HFGDHead', in_index=ALL, encoder=ENCODER, stop_gradient=False)
    stride = 4
    image_sizes = Guided.image_sizes
    compiled = False


class TestOfStride2(Guided):
    head = dict(Guided.head, upsampler=dict(type='USFPNHead', output_stride=2))
    stride = None


class TestOnSemanticFPN(Guided):
    head = dict(Guided.head, upsampler=dict(type='SemanticFPNHead', pyramid=FPN))
    # A neck with a config of its own.
    plain_convolutions = ('upsampler.pyramid.*',)


class TestOnUPer(Guided):
    head = dict(Guided.head, upsampler=dict(type='UPerHead', pool_scales=(1, 2)))


class TestOnDeepLabV3Plus(Guided):
    head = dict(Guided.head, upsampler=DLV3PLUS)
    # MMSegmentation's head does not pass it on to those.
    plain_convolutions = ('upsampler.*.depthwise_conv.conv', 'upsampler.*.pointwise_conv.conv')

    def config(self, **changes):
        channels = changes.get('levels', self.channels)
        # The level of the decoder is the first that this head takes.
        first = channels[changes.get('in_index', ALL)[0]]
        return self.with_upsampler(dict(DLV3PLUS, c1_in_channels=first), **changes)


class TestOnFPNHead(Guided):
    head = dict(Guided.head, upsampler=dict(type='FPNHead', feature_strides=list(STRIDES)))


class TestOnAHeadFromOutside(Guided):
    head = dict(Guided.head, upsampler=dict(type='OutsideHead', in_index=[0, 3]), norm_cfg=None)
    plain_convolutions = ('upsampler.mix',)

    def check_norm_cfg(self):
        self.outputs(self.build(norm_cfg=dict(type='GN', num_groups=2)), self.inputs(SIZE))


# --- a whole segmentor ---------------------------------------------------------------------------


def head_config(**changes) -> dict:
    cfg = dict(type='HFGDHead', in_channels=list(LEVELS), channels=8, num_classes=5)
    cfg.update(encoder=ENCODER, norm_cfg=dict(type='BN'), dropout_ratio=0)
    return copy.deepcopy({**cfg, **changes})


def segmentor(double: bool = True, backbone: dict | None = None, **changes) -> nn.Module:
    """HFGDHead, on a narrow ResNet-18 of mmseg where nothing else is said."""
    torch.manual_seed(0)
    backbone = backbone or dict(
        type='ResNetV1c',
        depth=18,
        stem_channels=8,
        base_channels=8,
        norm_cfg=dict(type='BN'),
        # Else the first convolutions of a block start without a gradient.
        zero_init_residual=False,
    )
    cfg = segmentor_config(head_config(**changes), backbone).model
    model = MODELS.build(cfg)
    model.init_weights()
    model.train()
    return model.double() if double else model


def batch(step: int = 0, images: int = 2) -> tuple[Tensor, list]:
    torch.manual_seed(100 + step)
    return torch.randn(images, 3, *SIZE, dtype=torch.float64), toy_samples(5, SIZE, images)


STUDENT, TEACHER = 'decode.loss_ce', 'decode.teacher_loss_ce'
#: A key's bias adds the same to all logits of a query: its gradient is 0 but for rounding.
KEY_BIASES = (
    'decode_head.axial_attention.column_query_key.key.conv.bias',
    'decode_head.encoder.attention.query_key.key.conv.bias',
)


def reached(model: nn.Module, loss: Tensor) -> tuple[set[str], set[str]]:
    """Parameters that a loss has a gradient for, and those for which it is not 0 everywhere."""
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
    gradients = {name: g for name, g in zip(named, found) if g is not None}
    assert all(g.isfinite().all() for g in gradients.values())
    return set(gradients), {name for name, g in gradients.items() if g.any()}


def parts(model: nn.Module) -> dict[str, set[str]]:
    """Names of the parameters of each part."""
    groups = dict(
        backbone='backbone.',
        encoder='decode_head.encoder.',
        teacher='decode_head.teacher_conv.',
        tokens='decode_head.conv_seg.',
        upsampler='decode_head.upsampler.',
        attention='decode_head.axial_attention.',
    )
    names = [name for name, _ in model.named_parameters()]
    found = {g: {n for n in names if n.startswith(prefix)} for g, prefix in groups.items()}
    assert set.union(*found.values()) == set(names)
    assert found['tokens'] == {'decode_head.conv_seg.weight', 'decode_head.conv_seg.bias'}
    return found


UPSAMPLERS = {
    'U-SFPN': dict(type='USFPNHead'),
    'U-SFPN OS2': dict(type='USFPNHead', output_stride=2),
    'SFPN': dict(type='SemanticFPNHead'),
    'SFPN of FPN': dict(type='SemanticFPNHead', pyramid=FPN),
    'UPer': dict(type='UPerHead', pool_scales=(1, 2)),
    'DeepLabV3+': DLV3PLUS,
    'FPN': dict(type='FPNHead', feature_strides=list(STRIDES)),
    'FaPN': dict(type='SemanticFPNHead', pyramid=dict(type='FaPN', deformable_groups=2)),
    'outside': dict(type='OutsideHead', in_index=[0, 3]),
}
CASES = {name: dict(upsampler=cfg) for name, cfg in UPSAMPLERS.items()}
CASES.update(
    {
        'no encoder': dict(encoder=None),
        'wider encoder': dict(encoder=dict(ENCODER, channels=12)),
        'FCN encoder': dict(encoder=dict(type='FCNHead', num_convs=1)),
        'no attention': dict(axial_attention=False),
        'one head': dict(axial_attention=dict(num_heads=1, share_axes=False)),
        'binary': dict(num_classes=2, out_channels=1, threshold=0.3, loss_decode='sigmoid'),
    }
)


def case(name: str, **changes) -> nn.Module:
    options = {**CASES[name], **changes}
    if options.get('loss_decode') == 'sigmoid':
        options['loss_decode'] = dict(type='CrossEntropyLoss', use_sigmoid=True)
    return segmentor(**options)


def losses_of(model: nn.Module, step: int = 0) -> dict[str, Tensor]:
    images, samples = batch(step)
    for sample in samples:
        label = sample.gt_sem_seg.data
        label[(label != 255) & (label >= model.decode_head.num_classes)] = 0
    return model.loss(images, samples)


@pytest.mark.parametrize('name', CASES)
def test_each_loss_reaches_its_own_parts(name):
    model = case(name)
    for key, weight in model.named_parameters():
        # FaPN's offsets start at 0, where what they are made of has no gradient.
        if 'offset_mask' in key:
            torch.nn.init.normal_(weight, std=0.1)
    group, losses = parts(model), losses_of(model)
    student = group['upsampler'] | group['attention']
    teacher = group['backbone'] | group['encoder'] | group['teacher'] | group['tokens']
    assert all(group[part] for part in ('backbone', 'tokens', 'upsampler'))
    assert bool(group['teacher']) is (name in ('no encoder', 'wider encoder'))

    has, some = reached(model, losses[STUDENT])
    assert has == student, 'the student has a gradient for other parameters than its own'
    assert student - some <= set(KEY_BIASES)
    has, some = reached(model, losses[TEACHER])
    assert has == teacher, 'the teacher has a gradient for other parameters than its own'
    assert teacher - some <= set(KEY_BIASES)
    total, _ = model.parse_losses(losses)
    has, _ = reached(model, total)
    assert has == student | teacher, 'DistributedDataParallel would wait for a gradient'


def test_norms_of_single_levels():
    """Swin's norms belong to one level each: the detached ones get a gradient of exactly 0."""
    model = segmentor(
        backbone=dict(
            type='SwinTransformer',
            embed_dims=8,
            depths=(1, 1, 1, 1),
            num_heads=(1, 1, 2, 2),
            window_size=4,
            drop_path_rate=0.0,
        )
    )
    inputs, samples = batch(0)
    losses = model.loss(inputs, samples)
    total, _ = model.parse_losses(losses)
    total.backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    for i in range(3):
        norm = getattr(model.backbone, f'norm{i}')
        assert not norm.weight.grad.any()
        assert not norm.bias.grad.any()
    assert model.backbone.norm3.weight.grad.any()
    # What a level holds does not get into the loss by it.
    nothing = model.decode_head._nothing([torch.full((1, 2, 3, 3), float('nan'))] * 4)
    assert nothing == 0


@pytest.mark.parametrize('name', ['U-SFPN', 'no encoder', 'UPer', 'DeepLabV3+'])
def test_without_stops_the_student_reaches_all(name):
    model = case(name, stop_gradient=False)
    group, losses = parts(model), losses_of(model)
    every = set.union(*group.values())
    has, some = reached(model, losses[STUDENT])
    # The convolution of a teacher without encoder is beside the way to the upsampler.
    assert has == every - group['teacher']
    assert has - some <= set(KEY_BIASES)
    has, some = reached(model, losses[TEACHER])
    assert has == every - group['upsampler'] - group['attention']


@pytest.mark.parametrize('name', ['U-SFPN', 'no encoder', 'UPer'])
def test_without_guidance_the_student_reaches_all(name):
    # Whatever stop_gradient says.
    for stop_gradient in (True, False):
        model = case(name, guidance=False, stop_gradient=stop_gradient)
        losses = losses_of(model)
        assert set(losses) == {STUDENT, 'decode.acc_seg'}
        has, some = reached(model, losses[STUDENT])
        every = {n for n, _ in model.named_parameters()}
        assert has == every
        assert every - some <= set(KEY_BIASES)


def trained(student: bool, steps: int = 4, **changes) -> nn.Module:
    """Some steps of SGD with both losses, or with the teacher's alone."""
    model = segmentor(double=False, **changes)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
    for step in range(steps):
        images, samples = batch(step)
        losses = model.loss(images.float(), samples)
        total = losses[TEACHER] + losses[STUDENT] if student else losses[TEACHER]
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize(
    'changes',
    [
        dict(),
        dict(encoder=None),
        dict(encoder=dict(ENCODER, channels=12), upsampler=DLV3PLUS, axial_attention=False),
    ],
    ids=['default', 'no encoder', 'DeepLabV3+'],
)
def test_the_teacher_trains_as_if_alone_to_the_bit(changes):
    both, alone = trained(True, **changes).state_dict(), trained(False, **changes).state_dict()
    start = segmentor(double=False, **changes).state_dict()
    differ = {name for name in both if not torch.equal(both[name], alone[name])}
    student = tuple(f'decode_head.{part}.' for part in ('upsampler', 'axial_attention'))
    assert differ
    assert all(name.startswith(student) for name in differ)
    # And it has trained.
    moved = {name for name in alone if not torch.equal(start[name], alone[name])}
    assert {name for name in alone if not name.startswith(student)} <= moved


def test_without_stops_the_student_moves_the_teacher():
    both, alone = (trained(s, 1, stop_gradient=False).state_dict() for s in (True, False))
    differ = {name for name in both if not torch.equal(both[name], alone[name])}
    assert {'backbone.layer1.0.conv1.weight', 'decode_head.conv_seg.weight'} <= differ
    assert 'decode_head.encoder.wide_conv.conv.weight' in differ


# --- the whole head written out ------------------------------------------------------------------


def naive_axial(attention: nn.Module, x: Tensor, heads: int = 4) -> Tensor:
    """Query, key and value of x; along every column, then along every row of that result."""
    convs = attention.column_query_key.query, attention.column_query_key.key, attention.value
    query, key, value = (
        torch.einsum('oc,nchw->nohw', c.conv.weight[..., 0, 0], x) + c.conv.bias.view(-1, 1, 1)
        for c in convs
    )

    def line(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(N, C, L): every head by itself."""
        found = []
        for qh, kh, vh in zip(q.chunk(heads, 1), k.chunk(heads, 1), v.chunk(heads, 1)):
            logits = torch.einsum('ncl,ncm->nlm', qh, kh) / qh.shape[1] ** 0.5
            weights = logits.exp() / logits.exp().sum(2, keepdim=True)
            found.append(torch.einsum('nlm,ncm->ncl', weights, vh))
        return torch.cat(found, 1)

    columns = [line(*(t[..., j] for t in (query, key, value))) for j in range(x.shape[3])]
    value = torch.stack(columns, 3)
    rows = [line(*(t[:, :, i] for t in (query, key, value))) for i in range(x.shape[2])]
    return torch.stack(rows, 2)


def build(**changes) -> HFGDHead:
    head = MODELS.build(head_config(**changes))
    head.init_weights()
    if head.axial_attention is not None:
        # Away from the start, where query and key are one.
        nn.init.normal_(head.axial_attention.column_query_key.key.conv.weight, std=0.3)
    return moved_norms(head).double()


def naive_logits(head: HFGDHead, inputs: list[Tensor], stride: int = 4) -> tuple[Tensor, Tensor]:
    """Logits of student and teacher, from section 3; gradients everywhere."""
    high = naive_encoder(head.encoder, inputs[3])
    student = naive_semantic_fpn(head.upsampler, [*inputs[:3], high], stride)
    student = naive_axial(head.axial_attention, student)
    weight, bias = head.conv_seg.weight[..., 0, 0], head.conv_seg.bias.view(-1, 1, 1)
    return tuple(torch.einsum('kc,nchw->nkhw', weight, x) + bias for x in (student, high))


@pytest.mark.stack
@pytest.mark.parametrize('stride', [4, 2])
def test_written_out(stride):
    size = (66, 103)
    head = build(
        upsampler=dict(type='USFPNHead', output_stride=stride),
        stop_gradient=False,
        teacher_loss_weight=0.6,
    ).train()
    inputs = [x.double().requires_grad_() for x in toy_features(LEVELS, STRIDES, size)]
    samples = toy_samples(5, size)
    label = torch.cat([sample.gt_sem_seg.data for sample in samples])
    expected, logits = {}, naive_logits(head, inputs, stride)
    for prefix, weight, x in zip(('', 'teacher_'), (1, 0.6), logits):
        x = F.interpolate(x, size, mode='bilinear')
        # mmseg divides by all pixels, the ignored ones too.
        loss = F.cross_entropy(x, label, ignore_index=255, reduction='sum') / label.numel()
        expected[f'{prefix}loss_ce'] = weight * loss
        right = (x.argmax(1) == label).sum() / (label != 255).sum()
        expected[f'{prefix}acc_seg'] = 100 * right.reshape(1)
    found = head.loss(inputs, samples, Config())
    assert list(found) == ['loss_ce', 'acc_seg', 'teacher_loss_ce', 'teacher_acc_seg']
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-8, check_dtype=False)
    wanted = [*inputs, *head.parameters()]
    gradients = [
        torch.autograd.grad(x['loss_ce'] + x['teacher_loss_ce'], wanted) for x in (found, expected)
    ]
    for f, e in zip(*gradients):
        torch.testing.assert_close(f, e, rtol=1e-6, atol=1e-9)
    # The same values, whatever is detached.
    twin = build(
        upsampler=dict(type='USFPNHead', output_stride=stride), teacher_loss_weight=0.6
    ).train()
    twin.load_state_dict(head.state_dict(), strict=True)
    stopped = twin.loss(inputs, samples, Config())
    for name, value in found.items():
        torch.testing.assert_close(stopped[name], value)
    # And of what the student trains, the same gradient.
    gradients = []
    for h, x in ((twin, stopped), (head, head.loss(inputs, samples, Config()))):
        own = [*h.upsampler.parameters(), *h.axial_attention.parameters()]
        gradients.append(torch.autograd.grad(x['loss_ce'], own))
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-10)


# --- switches ------------------------------------------------------------------------------------


def names(**changes) -> set[str]:
    return {n for n, _ in build(**changes).named_parameters()}


def test_each_switch_adds_or_takes_away_what_it_names():
    every = names()
    assert names(stop_gradient=False) == names(teacher_loss_weight=0.3) == every
    # The encoder's feature, already as wide as the tokens, is the teacher's.
    assert names(guidance=False) == every
    assert names(axial_attention=None) == names(axial_attention=False)
    attention = every - names(axial_attention=False)
    assert {n.split('.')[0] for n in attention} == {'axial_attention'}
    assert len(attention) == 6
    bare = names(encoder=None)
    assert {n.split('.')[0] for n in every - bare} == {'encoder'}
    layer = ('conv.weight', 'bn.weight', 'bn.bias')
    assert bare - every == {f'teacher_conv.{i}.{n}' for i in (0, 1) for n in layer}
    assert names(encoder=None, guidance=False) == bare & every
    wider = names(encoder=dict(ENCODER, channels=12))
    assert wider - every == {f'teacher_conv.{n}' for n in layer}
    assert not every - wider
    for upsampler in UPSAMPLERS.values():
        both = {n.split('.')[0] for n in names(upsampler=upsampler) ^ every}
        assert both <= {'upsampler'}


def test_the_teacher_of_a_level_itself_is_a_basic_fcn():
    head = build(encoder=None)
    assert head.encoder is None
    shapes = [tuple(m.conv.weight.shape) for m in head.teacher_conv]
    assert shapes == [(16, 64, 3, 3), (8, 16, 1, 1)]
    # The level itself enters the upsampler.
    assert head.upsampler.pyramid.lateral_convs[3].conv.in_channels == 64
    wider = build(encoder=dict(ENCODER, channels=12))
    assert wider.teacher_conv.conv.weight.shape == (8, 12, 1, 1)
    assert wider.upsampler.pyramid.lateral_convs[3].conv.in_channels == 12


def double(size=SIZE, images=2) -> list[Tensor]:
    return [x.double() for x in toy_features(LEVELS, STRIDES, size, images)]


@pytest.mark.parametrize('encoder', [ENCODER, None], ids=['CAE', 'identity'])
def test_guidance_and_stops_leave_the_logits(encoder):
    head, inputs = build(encoder=encoder).eval(), double()
    with torch.no_grad():
        expected = head(inputs)
    # With gradients enabled the student's classification goes another way.
    assert torch.equal(head(inputs), expected)
    for changes in (dict(stop_gradient=False), dict(guidance=False), dict(teacher_loss_weight=3)):
        twin = build(encoder=encoder, **changes).eval()
        missing = twin.load_state_dict(head.state_dict(), strict=False)
        assert not missing.missing_keys
        assert all(key.startswith('teacher_conv.') for key in missing.unexpected_keys)
        assert torch.equal(twin(inputs), expected)


def test_without_axial_attention_is_the_head_without_the_layer():
    full, inputs = build().eval(), double()
    twin = build(axial_attention=False).eval()
    unused = twin.load_state_dict(full.state_dict(), strict=False)
    assert not unused.missing_keys
    assert all(key.startswith('axial_attention.') for key in unused.unexpected_keys)
    with_layer = full(inputs)
    full.axial_attention = None
    assert torch.equal(full(inputs), twin(inputs))
    assert not torch.equal(full(inputs), with_layer)


def test_axial_attention_of_the_authors_library():
    head = build(channels=16)
    attention = head.axial_attention
    convs = [
        attention.column_query_key.query.conv,
        attention.column_query_key.key.conv,
        attention.value.conv,
    ]
    assert [tuple(c.weight.shape) for c in convs] == [(16, 16, 1, 1)] * 3
    assert all(c.bias is not None for c in convs)
    assert attention.row_query_key is None
    for pass_ in (attention.column_attention, attention.row_attention):
        assert pass_.num_heads == 4
        assert pass_.scale is None
    assert len(list(attention.parameters())) == 6
    one = build(axial_attention=dict(num_heads=2, qk_channels=4)).axial_attention
    assert one.row_attention.num_heads == 2
    assert one.column_query_key.key.conv.out_channels == 4


def test_levels_that_in_index_chooses():
    """The upsampler and the encoder count the levels that this head takes."""
    head, inputs = build().eval(), double()
    twin = build(in_channels=[8, 16, 32, 64], in_index=[1, 2, 3, 4]).eval()
    twin.load_state_dict(head.state_dict(), strict=True)
    assert torch.equal(twin([torch.randn(2, 3, 5, 5), *inputs]), head(inputs))
    some = build(upsampler=dict(type='USFPNHead', in_index=[0, 2, 3])).eval()
    assert [c.conv.in_channels for c in some.upsampler.pyramid.lateral_convs] == [8, 32, 8]
    before = some(inputs)
    inputs[1] = torch.randn_like(inputs[1])
    assert torch.equal(some(inputs), before)


# --- prediction and losses -----------------------------------------------------------------------


@pytest.mark.parametrize('encoder', [ENCODER, None], ids=['CAE', 'identity'])
def test_predicts_the_students_and_does_not_run_the_teachers(encoder):
    model, seen = segmentor(encoder=encoder), []
    head = model.decode_head
    head.conv_seg.register_forward_hook(lambda m, x, y: seen.append(tuple(x[0].shape)))
    if head.teacher_conv is not None:
        head.teacher_conv.register_forward_hook(lambda m, x, y: seen.append('teacher_conv'))
    images, samples = batch()
    model.loss(images, samples)
    fine, coarse = (2, 8, 24, 24), (2, 8, 3, 3)
    assert seen == ([coarse, fine] if encoder else ['teacher_conv', coarse, fine])
    seen.clear()
    model.eval()
    metas = [dict(img_shape=SIZE, ori_shape=SIZE, pad_shape=SIZE)] * 2
    with torch.no_grad():
        found = model.encode_decode(images, metas)
        levels = model.extract_feat(images)
        assert seen == [fine]
        high, _ = head._high(levels, ())
        student, _ = head._student(levels, high)
        expected = F.interpolate(head.conv_seg(student), SIZE, mode='bilinear')
        torch.testing.assert_close(found, expected)
        # Which is not the teacher's.
        teacher = high if head.teacher_conv is None else head.teacher_conv(high)
        coarse = F.interpolate(head.conv_seg(teacher), SIZE, mode='bilinear')
        assert (found - coarse).abs().max() > 1e-4


def test_arguments_by_place_or_by_name():
    """As mmseg's heads: plain, and behind another head."""
    head, inputs = build(encoder=dict(type='OCRHead', ocr_channels=6)).eval(), double()
    coarse, samples = torch.randn(2, 5, 3, 3, dtype=torch.float64), toy_samples(5, SIZE)
    metas = [dict(img_shape=SIZE, pad_shape=SIZE)] * 2
    losses = head.loss(inputs, coarse, samples, Config())
    logits = head.predict(inputs, coarse, metas, Config())
    for args, kwargs in (
        ((coarse,), dict(train_cfg=Config(), batch_data_samples=samples)),
        ((), dict(train_cfg=Config(), batch_data_samples=samples, prev_output=coarse)),
    ):
        torch.testing.assert_close(head.loss(inputs, *args, **kwargs), losses, rtol=0, atol=0)
    found = head.predict(inputs, coarse, batch_img_metas=metas, test_cfg=Config())
    assert torch.equal(found, logits)
    plain = build().eval()
    assert torch.equal(
        plain.predict(inputs, test_cfg=Config(), batch_img_metas=metas),
        plain.predict(inputs, metas, Config()),
    )
    # Python's own words: it binds them.
    with pytest.raises(TypeError, match="unexpected keyword argument 'samples'"):
        plain.loss(inputs, samples=samples, train_cfg=Config())


def test_no_encoder_of_a_cascade_behind_another_head():
    """The prediction of the head in front is not needed then, whatever it is."""
    head, inputs = build().eval(), double()
    samples, metas = toy_samples(5, SIZE), [dict(img_shape=SIZE, pad_shape=SIZE)] * 2
    losses = head.loss(inputs, samples, Config())
    for coarse in (torch.randn(2, 5, 3, 3), [torch.randn(2, 5, 3, 3)]):
        behind = head.loss(inputs, coarse, samples, Config())
        torch.testing.assert_close(behind, losses, rtol=0, atol=0)
        assert torch.equal(
            head.predict(inputs, coarse, metas, Config()), head.predict(inputs, metas, Config())
        )


@pytest.mark.parametrize('method', ['loss', 'predict'])
@pytest.mark.parametrize('behind', [False, True], ids=['alone', 'behind another head'])
def test_no_argument_takes_the_place_of_another(method, behind):
    """Each was bound without a word before, and the wrong one was used."""
    head = build(encoder=dict(type='OCRHead', ocr_channels=6) if behind else ENCODER)
    call, inputs, batch = getattr(head, method), double(), object()
    coarse = torch.randn(2, 5, 3, 3, dtype=torch.float64)
    first = (coarse,) if behind else ()
    cfg = 'train_cfg' if method == 'loss' else 'test_cfg'
    with pytest.raises(TypeError, match=f"multiple values for argument '{cfg}'"):
        call(inputs, *first, batch, Config(), **{cfg: Config()})
    with pytest.raises(TypeError, match="multiple values for argument 'prev_output'"):
        call(inputs, batch, prev_output=coarse, **{cfg: Config()})
    with pytest.raises(TypeError, match="multiple values for argument 'prev_output'"):
        call(inputs, batch, Config(), prev_output=coarse)
    with pytest.raises(TypeError, match=f"missing 1 required positional argument: '{cfg}'"):
        call(inputs, *first, batch)


def test_the_names_in_the_log():
    model = segmentor()
    losses = losses_of(model)
    total, log = model.parse_losses(losses)
    expected = ['loss_ce', 'acc_seg', 'teacher_loss_ce', 'teacher_acc_seg']
    assert set(log) == {'loss', *(f'decode.{name}' for name in expected)}
    torch.testing.assert_close(total, losses[STUDENT] + losses[TEACHER])
    assert log['loss'] == total


def test_weight_of_the_teachers_loss():
    plain = losses_of(segmentor())
    weighted = losses_of(segmentor(teacher_loss_weight=0.25))
    assert list(plain) == list(weighted)
    for name, value in plain.items():
        factor = 0.25 if name == TEACHER else 1
        torch.testing.assert_close(weighted[name], factor * value)
    # Several losses: each of the teacher's is weighted.
    kinds = [
        dict(type='CrossEntropyLoss', loss_name='loss_first'),
        dict(type='DiceLoss', loss_name='loss_second'),
    ]
    plain = losses_of(segmentor(loss_decode=kinds))
    weighted = losses_of(segmentor(loss_decode=kinds, teacher_loss_weight=0.25))
    for name in ('first', 'second'):
        for prefix, factor in (('', 1), ('teacher_', 0.25)):
            key = f'decode.{prefix}loss_{name}'
            torch.testing.assert_close(weighted[key], factor * plain[key])


def test_each_branch_has_hard_pixels_of_its_own():
    kept = 150
    sampler = dict(type='OHEMPixelSampler', min_kept=kept)
    head, inputs = build(sampler=sampler).train(), double()
    samples = toy_samples(5, SIZE)
    label = torch.cat([sample.gt_sem_seg.data for sample in samples])
    losses = head.loss(inputs, samples, Config())
    chosen = []
    for name, logits in zip(('loss_ce', 'teacher_loss_ce'), naive_logits(head, inputs)):
        logits = F.interpolate(logits, SIZE, mode='bilinear')
        pixels = F.cross_entropy(logits, label, ignore_index=255, reduction='none').flatten()
        hardest, places = pixels.topk(2 * kept)
        torch.testing.assert_close(losses[name], hardest.sum() / label.numel(), check_dtype=False)
        chosen.append(set(places.tolist()))
    assert chosen[0] != chosen[1]
    # What is sampled still stops.
    named = dict(head.named_parameters())
    found = torch.autograd.grad(losses['loss_ce'], list(named.values()), allow_unused=True)
    got = {n.split('.')[0] for n, g in zip(named, found) if g is not None}
    assert got == {'upsampler', 'axial_attention'}


def test_dropout_of_both_branches():
    head, inputs = build(dropout_ratio=0.5).train(), double()
    samples, dropped = toy_samples(5, SIZE), []
    head.dropout.register_forward_hook(lambda m, x, y: dropped.append((x[0].shape[2], y)))
    head.loss(inputs, samples, Config())
    assert [size for size, _ in dropped] == [3, 24]
    # Whole channels, other ones each time.
    gone = [(y == 0).all(3).all(2) for _, y in dropped]
    assert all(0 < g.sum() < g.numel() for g in gone)
    assert not torch.equal(*gone)
    # The parts drop nothing: what dropped is the head's.
    assert [type(m).__name__ for m in head.modules() if isinstance(m, nn.Dropout2d)] == [
        'Dropout2d'
    ]


# --- OCR, CAR, scale equalization ----------------------------------------------------------------


def test_ocr_as_encoder():
    common = dict(num_classes=5, norm_cfg=dict(type='BN'), dropout_ratio=0)
    # On the level of the encoder, whose pixels the coarse prediction gathers.
    first = dict(type='FCNHead', in_channels=64, in_index=3, channels=6, num_convs=1, **common)
    second = head_config(encoder=dict(type='OCRHead', ocr_channels=6))
    cfg = segmentor_config(second, dict(type='TinyPyramid')).model
    cfg.update(type='CascadeEncoderDecoder', num_stages=2, decode_head=[first, second])
    model = MODELS.build(cfg).train()
    model.init_weights()
    images, samples = batch()
    losses = model.loss(images.float(), samples)
    assert {name for name in losses if 'loss' in name} == {
        'decode_0.loss_ce',
        'decode_1.loss_ce',
        'decode_1.teacher_loss_ce',
    }
    total, _ = model.parse_losses(losses)
    every = {name for name, _ in model.named_parameters()}
    has, _ = reached(model, total)
    assert has == every
    has, _ = reached(model, losses['decode_1.loss_ce'])
    student = tuple(f'decode_head.1.{part}.' for part in ('upsampler', 'axial_attention'))
    assert has == {name for name in every if name.startswith(student)}
    # The coarse prediction guides the encoder.
    has, _ = reached(model, losses['decode_1.teacher_loss_ce'])
    assert 'decode_head.0.conv_seg.weight' in has
    assert has >= {n for n in every if n.startswith(('decode_head.1.encoder.', 'backbone.'))}

    model.eval()
    metas = [dict(img_shape=SIZE, ori_shape=SIZE, pad_shape=SIZE)] * 2
    with torch.no_grad():
        found = model.encode_decode(images.float(), metas)
        levels = model.extract_feat(images.float())
        coarse = model.decode_head[0](levels)
        logits = model.decode_head[1](levels, coarse)
        assert logits.shape == (2, 5, 24, 24)
        expected = F.interpolate(logits, SIZE, mode='bilinear')
        torch.testing.assert_close(found, expected)
        assert not torch.equal(model.decode_head[1](levels, coarse.flip(1)), logits)


@pytest.mark.filterwarnings('ignore')
def test_the_scale_equalizer_runs_by_its_line(tmp_path):
    """The concatenations of the upsampler are found behind the stop-gradients."""
    head = dict(head_config(), in_channels=[4, 8, 16, 32], num_classes=8)
    uper = dict(head, upsampler=dict(type='UPerHead', pool_scales=(1, 2)))
    made = runner(tmp_path / 'uper', head=uper, hook={})
    made.train()
    hook = next(h for h in made.hooks if type(h).__name__ == 'ScaleEqualizerHook')
    fusions = {entry['name'] for entry in hook.record['layers']}
    prefix = 'decode_head.upsampler'
    assert fusions == {f'{prefix}.bottleneck.conv', f'{prefix}.fpn_bottleneck.conv'}
    assert all(p.isfinite().all() for p in made.model.parameters())
    # U-SFPN adds its branches up.
    made = runner(tmp_path / 'sums', head=head, hook={})
    with pytest.raises(RuntimeError, match=r'searched: decode_head \(HFGDHead\)'):
        made.train()


# --- costs ---------------------------------------------------------------------------------------


def test_multiply_adds_of_the_paper():
    """ResNet-50 at 513 x 513 (table 9): ratios within a tenth of the published ones."""
    heads = dict(
        sfpn=dict(type='SemanticFPNHead'),
        os4=dict(type='HFGDHead'),
        os2=dict(type='HFGDHead', upsampler=dict(type='USFPNHead', output_stride=2)),
    )
    found = {}
    for name, head in heads.items():
        wide = dict(in_channels=[256, 512, 1024, 2048], num_classes=59, norm_cfg=dict(type='BN'))
        backbone = dict(type='ResNetV1c', depth=50, norm_cfg=dict(type='BN'))
        found[name] = count(segmentor_config({**wide, **head}, backbone).model, 513).flops / 1e9
    published = dict(sfpn=45.65, os4=71.63, os2=153.62)
    for above, below in (('os4', 'sfpn'), ('os2', 'os4')):
        ratio = published[above] / published[below]
        assert found[above] / found[below] == pytest.approx(ratio, rel=0.1)
    assert found == pytest.approx(dict(sfpn=44.89, os4=68.61, os2=137.10), abs=0.01)


# --- compilers and several processes -------------------------------------------------------------


def two_levels() -> tuple[HFGDHead, list[Tensor]]:
    """A head of which little has to be compiled."""
    return build(in_channels=[8, 64]).train(), [x for x in double() if x.shape[1] in (8, 64)]


def test_compiles_as_one_graph():
    torch._dynamo.reset()
    head, inputs = two_levels()
    compiled = torch.compile(head, backend='eager', fullgraph=True)
    wanted, results = [*head.parameters()], []
    for call in (compiled, head):
        # In training, where tokens and levels are detached.
        logits = call(inputs)
        gradients = torch.autograd.grad(logits.square().mean(), wanted, allow_unused=True)
        results.append([logits, *gradients])
    assert sum(g is None for g in results[0]) > 10
    for f, e in zip(*results):
        assert (f is None) is (e is None)
        if f is not None:
            torch.testing.assert_close(f, e)


def test_compiled_loss():
    torch._dynamo.reset()
    (head, inputs), samples = two_levels(), toy_samples(5, SIZE)
    wanted = [inputs[1].requires_grad_(), *head.parameters()]
    losses, gradients = [], []
    for call in (torch.compile(head.loss, backend='eager'), head.loss):
        losses.append(call(inputs, samples, Config()))
        total = losses[-1]['loss_ce'] + losses[-1]['teacher_loss_ce']
        gradients.append(torch.autograd.grad(total, wanted))
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)


def train_steps(rank: int, world: int, steps: int = 2) -> dict[str, Tensor]:
    """Gradients of the last of some steps, each process on an image pair of its own."""
    if world > 1:
        init_dist('pytorch', backend='gloo')
    model = segmentor()
    # A pair that the preprocessor has not touched.
    model.data_preprocessor = None
    wrapped = model
    if world > 1:
        wrapped = MMDistributedDataParallel(model, find_unused_parameters=False)
    for _ in range(steps):
        model.zero_grad()
        images, samples = batch(10 * rank)
        # A step that lacks a gradient makes the next one raise.
        total, _ = model.parse_losses(wrapped(images, samples, mode='loss'))
        total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.filterwarnings('ignore')
def test_two_processes_without_unused_parameters(tmp_path):
    two = in_processes(train_steps, 2, tmp_path)
    alone = [train_steps(rank, 1) for rank in range(2)]
    assert len(two[0]) > 80
    for name in two[0]:
        assert torch.equal(two[0][name], two[1][name]), name
        mean = (alone[0][name] + alone[1][name]) / 2
        torch.testing.assert_close(two[0][name], mean, rtol=1e-8, atol=1e-12)


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('wrong', 'message'),
    [
        (dict(in_channels=64), r'HFGDHead: in_channels must list the channels .* got 64'),
        (
            dict(upsampler=None),
            r'HFGDHead: upsampler must be the config of a decode head.*got None',
        ),
        (
            dict(upsampler=dict(channels=4)),
            r'HFGDHead: upsampler must be the config of a decode he',
        ),
        (dict(encoder=dict(channels=4)), r'HFGDHead: encoder must be the config of a decode head'),
        (
            dict(upsampler=dict(type='USFPNHead', channels=12)),
            r'the class tokens have 8 channels, and the upsampler USFPNHead gives 12: set '
            r'decode_head\.channels=12, or decode_head\.upsampler\.channels',
        ),
        (
            dict(axial_attention=dict(num_heads=3)),
            r'8 channels cannot be split over 3 heads: set decode_head\.channels, or',
        ),
        (dict(axial_attention='yes'), r"axial_attention must be True, False or a dict.*got 'yes'"),
        (
            dict(upsampler=dict(type='USFPNHead', in_index=[0, 4])),
            r'upsampler\.in_index counts the 4 levels of the head, 0 to 3, got \[0, 4\]',
        ),
        (
            dict(encoder=dict(type='FCNHead', in_index=7)),
            r'HFGDHead: encoder: FCNHead has in_index=7.*set encoder\.in_channels',
        ),
    ],
)
def test_wrong_config(wrong, message):
    with pytest.raises(ValueError, match=message):
        build(**wrong)


def test_ocr_without_a_first_head_is_refused():
    head = build(encoder=dict(type='OCRHead', ocr_channels=4))
    with pytest.raises(ValueError, match=r"OCRHead refines .* model\.type='CascadeEncoderDecoder'"):
        head(double())


def test_an_encoder_may_see_another_level():
    head = build(encoder=dict(type='FCNHead', in_index=2, num_convs=1))
    assert head.encoder.in_channels == LEVELS[2]
    assert head(double()).shape[1] == 5


@pytest.mark.parametrize('changes', [{}, dict(guidance=False), dict(stop_gradient=False)])
def test_levels_that_the_upsampler_leaves_out_are_not_unused(changes):
    head = build(upsampler=dict(type='FCNHead', in_index=3), **changes)
    inputs = [x.requires_grad_() for x in double()]
    losses = head.loss(inputs, toy_samples(5, SIZE, 2), None)
    (losses['loss_ce'] + losses.get('teacher_loss_ce', 0)).backward()
    assert all(x.grad is not None for x in inputs)


class InPlaceHead(OutsideHead):
    """An upsampler that overwrites what it is given."""

    def forward(self, inputs):
        return super().forward([x.mul_(2) for x in inputs])


def test_an_upsampler_in_place_does_not_change_the_teacher_in_silence():
    with MODELS.switch_scope_and_registry(None):
        MODELS.register_module(module=InPlaceHead, force=True)
    plain = build(encoder=None, upsampler=dict(type='OutsideHead', in_index=[0, 3]))
    rude = build(encoder=None, upsampler=dict(type='InPlaceHead', in_index=[0, 3]))
    rude.load_state_dict(plain.state_dict())
    samples, levels = toy_samples(5, SIZE, 2), double()
    expected = plain.loss([x.clone() for x in levels], samples, None)['teacher_loss_ce']
    assert torch.equal(rude.loss(levels, samples, None)['teacher_loss_ce'], expected)
