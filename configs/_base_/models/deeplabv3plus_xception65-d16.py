# DeepLabV3+ with Xception-65, output stride 16: ASPP and decoder of separable convolutions.
norm_cfg = dict(type='SyncBN', eps=1e-3, requires_grad=True)
# DeepLab's weights for ImageNet, as timm publishes them.
checkpoint_file = 'https://github.com/huggingface/pytorch-image-models/releases/download/v0.1-weights/tf_xception_65-c9ae96e8.pth'
data_preprocessor = dict(
    type='SegDataPreProcessor',
    # To [-1, 1], as those weights expect.
    mean=[127.5, 127.5, 127.5],
    std=[127.5, 127.5, 127.5],
    bgr_to_rgb=True,
    pad_val=0,
    seg_pad_val=255)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=data_preprocessor,
    backbone=dict(
        type='AlignedXception',
        depth=65,
        output_stride=16,
        out_indices=(0, 1, 2, 3),
        norm_cfg=norm_cfg,
        norm_eval=False,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint_file)),
    decode_head=dict(
        type='DepthwiseSeparableASPPHead',
        in_channels=2048,
        in_index=3,
        channels=256,
        # 1: the 1x1 branch. For output stride 16; the others doubled at 8.
        dilations=(1, 6, 12, 18),
        c1_in_channels=256,
        c1_channels=48,
        dropout_ratio=0.1,
        num_classes=21,
        norm_cfg=norm_cfg,
        # Crops of a multiple of the stride plus one: corners of feature and image coincide.
        align_corners=True,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'))
