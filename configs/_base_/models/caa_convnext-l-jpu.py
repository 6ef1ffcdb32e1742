# CAA behind ConvNeXt-L of mmpretrain and joint pyramid upsampling, output stride 8.
# A config on it imports mmpretrain as well:
# custom_imports = dict(imports=['mmseg_fusion', 'mmpretrain.models'], allow_failed_imports=False)
norm_cfg = dict(type='SyncBN', eps=1e-3, requires_grad=True)
checkpoint_file = 'https://download.openmmlab.com/mmclassification/v0/convnext/downstream/convnext-large_3rdparty_in21k_20220301-e6e0ea0a.pth'
data_preprocessor = dict(
    type='SegDataPreProcessor',
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    bgr_to_rgb=True,
    pad_val=0,
    seg_pad_val=255)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=data_preprocessor,
    backbone=dict(
        type='mmpretrain.ConvNeXt',
        arch='large',
        out_indices=[1, 2, 3],
        drop_path_rate=0.4,
        layer_scale_init_value=1.0,
        gap_before_final_norm=False,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint_file, prefix='backbone.')),
    # In place of dilation, which the backbone does not take: strides 8, 16 and 32 to stride 8.
    neck=dict(
        type='JPU',
        in_channels=(384, 768, 1536),
        mid_channels=512,
        dilations=(1, 2, 4, 8),
        align_corners=True,
        norm_cfg=norm_cfg),
    decode_head=dict(
        type='CAAHead',
        in_channels=2048,
        in_index=2,
        channels=256,
        attention='channelized_axial',
        attention_channels=512,
        qk_channels=64,
        gate_channels=128,
        gate_layers=5,
        image_level=True,
        dropout_ratio=0.1,
        num_classes=19,
        norm_cfg=norm_cfg,
        align_corners=True,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)),
    # As in the authors' code: one 3x3 convolution on what the decode head takes.
    auxiliary_head=dict(
        type='FCNHead',
        in_channels=2048,
        in_index=2,
        channels=512,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=19,
        norm_cfg=norm_cfg,
        align_corners=True,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=0.4)),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'))
