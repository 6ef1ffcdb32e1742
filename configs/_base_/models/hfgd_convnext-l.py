# HFGD with ConvNeXt-L of mmpretrain. A config on it imports mmpretrain as well:
# custom_imports = dict(imports=['mmseg_fusion', 'mmpretrain.models'], allow_failed_imports=False)
# and adds the class-aware regularization of CAE: type='CAREncoderDecoder',
# car=dict(layer='encoder.out_conv')
head_norm_cfg = dict(type='SyncBN', eps=1e-3, requires_grad=True)
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
        out_indices=[0, 1, 2, 3],
        drop_path_rate=0.4,
        layer_scale_init_value=1.0,
        gap_before_final_norm=False,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint_file, prefix='backbone.')),
    decode_head=dict(
        type='HFGDHead',
        in_channels=[192, 384, 768, 1536],
        in_index=[0, 1, 2, 3],
        channels=256,
        upsampler=dict(type='USFPNHead'),
        encoder=dict(
            type='ContextAugmentedEncoder',
            wide_channels=2048,
            attention_channels=512,
            qk_channels=64),
        guidance=True,
        axial_attention=True,
        stop_gradient=True,
        dropout_ratio=0.,
        num_classes=19,
        norm_cfg=head_norm_cfg,
        align_corners=True,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'))
